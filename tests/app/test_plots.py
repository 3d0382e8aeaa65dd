"""The picture is drawn from the record alone, names what it shows, and needs no display."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from runs import made_up_run

from controlprune.app.plots import plot
from controlprune.loop.history import History


def titles(figure: Figure) -> list[str]:
    return [axis.get_title(loc="left") for axis in figure.axes]


@pytest.mark.parametrize(("groups", "updates"), [(1, 1), (7, 120), (70, 60)])
def test_every_size_of_run_is_drawn_and_written(tmp_path: Path, groups: int, updates: int) -> None:
    run = made_up_run(groups, updates)
    path = tmp_path / "new" / "dynamics.png"
    figure = plot(run, path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    words = " ".join(titles(figure)).lower()
    for panel in ("active units", "resource", "price", "loss", "back on"):
        assert panel in words
    labels = figure.axes[0].get_yticklabels()
    assert len(labels) <= 64
    assert labels[0].get_text().startswith(run.names[0])


def test_the_heat_map_shows_the_active_fractions() -> None:
    run = made_up_run(groups=3, updates=20)
    mesh = next(item for item in plot(run).axes[0].collections if isinstance(item, QuadMesh))
    drawn = np.asarray(mesh.get_array()).reshape(3, 20)
    assert np.allclose(drawn[:, 7], np.array(run[7].active) / np.array(run.sizes))


def test_size_changes_are_ticked_and_counted() -> None:
    texts = [text.get_text() for text in plot(made_up_run()).axes[0].texts]
    assert texts.count("▼") == 2
    assert any("▼ shrunk 2×" in text for text in texts)


def test_a_run_without_price_or_with_a_loss_that_is_not_finite_still_draws() -> None:
    run, bare = made_up_run(updates=30), History(("a",), (4,), {}, total_steps=30)
    for row in run:
        loss = float("nan") if row.step < 100 else row.loss
        bare.append(
            replace(row, loss=loss, price={}, reference={}, active=(2,), widths=(4,), off=(0,), on=(0,))
        )
    assert not any("Price" in title for title in titles(plot(bare)))


def test_plotting_leaves_no_global_state() -> None:
    plot(made_up_run(updates=5))
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_an_empty_history_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"history is empty: call controller\.step"):
        plot(History(("a",), (4,), {}, total_steps=1))
