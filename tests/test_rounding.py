"""Blocks are told from times; a measurement is made once and then read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from controlprune import rounding

WIDTHS = (48, 49, 56, 57, 60, 61, 63, 64)


@pytest.mark.parametrize("m", [1, 4, 8, 16])
def test_a_staircase_is_told_by_its_step(m: int) -> None:
    assert rounding.block({n: float(-(-n // m) * m) ** 2 for n in WIDTHS}) == m


def test_wider_that_is_faster_is_preferred() -> None:
    times = {n: float(n) ** 2 * (1.0 if n % 8 == 0 else 1.5) for n in WIDTHS}
    assert rounding.block(times) == 8


def test_measured_once_then_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    before = torch.get_rng_state()
    first = rounding.preferred_multiple(cpu, torch.float32, tmp_path)
    assert first in (1, *rounding.MULTIPLES)
    assert torch.equal(torch.get_rng_state(), before)
    assert list(json.loads((tmp_path / "rounding.json").read_text()).values()) == [first]
    monkeypatch.setattr(rounding, "_measure", lambda device, dtype: pytest.fail("measured twice"))
    assert rounding.preferred_multiple(cpu, torch.float32, tmp_path) == first


def test_a_broken_cache_is_measured_anew(tmp_path: Path) -> None:
    (tmp_path / "rounding.json").write_text("[1")
    assert rounding.preferred_multiple(torch.device("cpu"), torch.float32, tmp_path) >= 1
