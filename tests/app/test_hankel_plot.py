"""Hankel singular values over training, drawn from the record of a truncation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from controlprune.app.hankel_plot import plot_values
from controlprune.ssm import LRU, Truncation


def test_every_layer_has_a_panel_and_every_cut_a_line(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"low": LRU(2, 8), "high": LRU(2, 6)})
    truncation = Truncation(
        model, None, total_steps=10, tolerance=0, states=2, window=0.5, cuts=2, record_every=2
    )
    for _ in range(10):
        truncation.step()
    assert [record.step for record in truncation.history] == [2, 4, 5, 6, 8, 10]
    figure = plot_values(truncation.history, tmp_path / "new" / "hankel.png")
    assert (tmp_path / "new" / "hankel.png").read_bytes()[:4] == b"\x89PNG"
    assert [axis.get_title(loc="left").split(":")[0] for axis in figure.axes] == ["low", "high"]
    assert [text.get_text().strip() for text in figure.axes[0].texts] == ["8 → 4", "4 → 2"]


def test_nothing_recorded_is_said() -> None:
    with pytest.raises(ValueError, match="history is empty"):
        plot_values([])
