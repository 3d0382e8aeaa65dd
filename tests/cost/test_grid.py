"""Blocks are told from times; a measurement is made once and then read; only wide convolutions take part."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import WORKLOADS
from torch import nn

import controlprune as cp
from controlprune.allocate.knapsack import Tradeoff, solve
from controlprune.app.tasks import lenet
from controlprune.cost import grid as rounding
from controlprune.cost.cache import device_name
from controlprune.cost.flops import flops
from controlprune.cost.problem import pose
from controlprune.structure import analyse
from controlprune.structure.groups import Structure

WIDTHS = (48, 49, 56, 57, 60, 61, 63, 64)
MEASURE = rounding._measure  # the real one; tests run with a fixed answer
CPU = torch.device("cpu")


@pytest.mark.parametrize("m", [1, 4, 8, 16])
def test_a_staircase_is_told_by_its_step(m: int) -> None:
    assert rounding.block({n: float(-(-n // m) * m) ** 2 for n in WIDTHS}) == m


def test_noise_hides_no_staircase() -> None:
    noise = np.random.default_rng(0)
    for _ in range(20):
        times = {n: float(-(-n // 16)) ** 1.5 * noise.uniform(0.95, 1.05) for n in WIDTHS}
        assert rounding.block(times) == 16


def test_wider_that_is_faster_is_preferred() -> None:
    times = {n: float(n) ** 2 * (1.0 if n % 8 == 0 else 1.5) for n in WIDTHS}
    assert rounding.block(times) == 8


def test_measured_once_then_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "_measure", MEASURE)
    before, began = torch.get_rng_state(), time.process_time()
    first = rounding.preferred_multiple(CPU, torch.float32, tmp_path)
    assert time.process_time() - began < 1.0
    assert first in (1, *rounding.MULTIPLES)
    assert torch.equal(torch.get_rng_state(), before)
    assert list(json.loads((tmp_path / "rounding.json").read_text()).values()) == [first]
    monkeypatch.setattr(rounding, "_measure", lambda device, dtype: pytest.fail("measured twice"))
    assert rounding.preferred_multiple(CPU, torch.float32, tmp_path) == first


@pytest.mark.parametrize("text", ["[1", "[]", '{"KEY": 3}', '{"KEY": "16"}', '{"KEY": null}'])
def test_a_broken_cache_is_measured_anew(tmp_path: Path, text: str) -> None:
    file = tmp_path / "rounding.json"
    file.write_text(text.replace("KEY", device_name(CPU, torch.float32)))
    assert rounding.preferred_multiple(CPU, torch.float32, tmp_path) == 16
    assert json.loads(file.read_text()) == {device_name(CPU, torch.float32): 16}


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert rounding.preferred_multiple(CPU, torch.float32, tmp_path / "file" / "folder") == 16


def multiples(model: nn.Module, x: torch.Tensor, *, timed: bool = False) -> dict[int, int]:
    structure = analyse(model, (x,))
    found = rounding.group_multiples(structure, dict(model.named_parameters()), timed=timed)
    return dict(zip(structure.sizes, found, strict=True))


def test_only_wide_groups_that_convolutions_read() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 48, 3), nn.Conv2d(48, 64, 3), nn.Conv2d(64, 80, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(80, 256), nn.ReLU(), nn.Linear(256, 10),
    )  # fmt: skip
    assert multiples(net, torch.randn(2, 3, 12, 12)) == {48: 1, 64: 16, 80: 1, 256: 1}


def test_a_clock_under_budget_counts_every_block_of_a_convolution() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.Conv2d(12, 48, 3), nn.Conv2d(48, 80, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(80, 256), nn.ReLU(), nn.Linear(256, 10),
    )  # fmt: skip
    assert multiples(net, torch.randn(2, 3, 12, 12), timed=True) == {12: 1, 48: 16, 80: 16, 256: 1}


@pytest.mark.parametrize(("round_to", "steps"), [(None, (16, 4, 4)), (2, (2, 2, 2))])
def test_attach_takes_what_was_measured_unless_told(round_to: int | None, steps: tuple[int, ...]) -> None:
    convolutions = nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3)
    net = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(1024, 64), nn.Linear(64, 2))
    controller = cp.attach(
        net,
        torch.optim.SGD(net.parameters(), lr=0.1),
        budget=cp.Budget(flops=0.5),
        example_inputs=(torch.randn(2, 3, 8, 8),),
        total_steps=10,
        round_to=round_to,
    )
    assert controller._run.problem.steps == steps


CNNS = {
    "lenet": (lambda: lenet(1), (1, 8, 8)),
    "residual": (lambda: WORKLOADS["cnn"].build((64, 64, 128, 128)), (3, 16, 16)),
    "narrow residual": (lambda: WORKLOADS["cnn"].build(WORKLOADS["cnn"].dense), (3, 16, 16)),
}


@pytest.mark.parametrize("share", [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
@pytest.mark.parametrize("net", CNNS)
def test_the_budget_is_still_filled(net: str, share: float) -> None:
    """Within 2 points under the limit, whatever the values say; wide groups mostly at the multiple."""
    build, shape = CNNS[net]
    model = build()
    structure: Structure = analyse(model, (torch.zeros(1, *shape),))
    found = rounding.group_multiples(structure, dict(model.named_parameters()))
    problem = pose(
        structure,
        cp.Budget(flops=share),
        {"flops": flops(structure)},
        total_steps=9,
        round_to=None,
        batch=1,
        seed=0,
        multiples=found,
    )
    cost, dense = flops(structure), problem.dense["flops"]
    draw = np.random.default_rng(0)
    off = []
    for _ in range(5):
        values = tuple(draw.lognormal(0, 1, n) * draw.lognormal(0, 1) / n for n in structure.sizes)
        problem = Tradeoff(
            values,
            (cost,),
            np.array([share * dense]),
            np.zeros(1),
            problem.floors,
            problem.steps,
            problem.grains,
        )
        solution = solve(problem)
        assert share - 0.02 <= solution.costs[0] / dense <= share * (1 + 1e-9)
        wide = [n % 16 for n, m in zip(solution.widths, found, strict=True) if m == 16]
        off += [sum(rest > 0 for rest in wide)]
    assert np.mean(off) <= 1.0  # at most one group takes what is left over
