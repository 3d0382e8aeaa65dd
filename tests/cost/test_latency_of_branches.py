"""A branch on or off is another latency: timed really skipped, told apart from width, used by a budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import controlprune as cp
from controlprune.cost.grid import Steps
from controlprune.cost.latency import latency
from controlprune.granularity.layers import Layers
from controlprune.plant.base import named_tensors
from controlprune.structure import Structure

WIDTH, INNER = 16, 32


class Ticks:
    now = 0.0

    @classmethod
    def clock(cls) -> float:
        return cls.now


class Ticking(nn.Linear):
    """Takes 0.2 ms to get started and 1 µs per kFLOP."""

    def forward(self, x: Tensor) -> Tensor:
        Ticks.now += 2e-4 + 1e-9 * 2 * len(x) * self.weight.numel()
        return super().forward(x)


class Net(nn.Module):
    """Four branches; the loss needs the first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 4)
        self.branches = nn.ModuleList(
            nn.Sequential(Ticking(WIDTH, INNER), nn.ReLU(), Ticking(INNER, WIDTH)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        Ticks.now += 1e-3
        x = self.stem(x)
        for branch in self.branches:
            x = x + branch(x)
        return self.head(x)


def seconds(on: Sequence[int], inner: Sequence[int], batch: int) -> float:
    run = (2 * 2e-4 + 1e-9 * 2 * batch * n * (2 * WIDTH) for n, there in zip(inner, on, strict=True) if there)
    return 1e-3 + sum(run)


def traced(model: nn.Module, x: Tensor, *, channels: bool) -> tuple[Structure, Steps]:
    structure = Layers(channels=channels).trace(model, (x,), [model.stem, model.head])  # type: ignore[list-item]
    return structure, Steps.of(structure, None)


@pytest.mark.parametrize("channels", [False, True])
def test_every_branch_has_its_share(channels: bool, tmp_path: Path) -> None:
    """At any of them on or off, and at other widths of those that are on."""
    torch.manual_seed(0)
    model, x = Net(), torch.randn(64, 8)
    before = {name: (id(tensor), tensor.clone()) for name, tensor in named_tensors(model).items()}
    structure, steps = traced(model, x, channels=channels)
    found = latency(
        structure,
        model,
        (x,),
        rungs=steps.rungs(structure.sizes),
        floors=steps.floors,
        clock=Ticks.clock,
        seconds=0.1,
        cache=tmp_path,
    )
    assert {name: id(t) for name, t in named_tensors(model).items()} == {n: i for n, (i, _) in before.items()}
    assert all(torch.equal(t, before[name][1]) for name, t in named_tensors(model).items())
    assert all(
        type(module) in (nn.Sequential, nn.ReLU, Ticking)
        for module in model.branches.modules()
        if module is not model.branches
    )
    where = {group.name: g for g, group in enumerate(structure.groups)}
    draw = torch.Generator().manual_seed(1)
    for _ in range(12):
        on = torch.randint(0, 2, (4,), generator=draw).tolist()
        inner = torch.randint(8, INNER + 1, (4,), generator=draw).tolist() if channels else [INNER] * 4
        widths = list(structure.sizes)
        for k in range(4):
            widths[where[f"layer branches.{k}"]] = on[k]
            if channels:
                widths[where[f"branches.{k}.0"]] = inner[k]
        assert found.seconds.value(widths) == pytest.approx(seconds(on, inner, 64), rel=0.02)
    assert found.least == pytest.approx(1e-3, rel=1e-6)
    assert found.error < 0.05


@pytest.mark.parametrize("granularity", ["layer", "channel+layer"])
def test_a_latency_budget_takes_branches_out(granularity: str) -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(64, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    controller = cp.attach(
        model,
        optimizer,
        budget=cp.Budget(latency=0.6),
        example_inputs=(x,),
        total_steps=40,
        granularity=granularity,
        ignored_layers=["stem", "head"],
        instruments=cp.Instruments(clock=Ticks.clock),
    )
    dense = seconds([1] * 4, [INNER] * 4, 64)
    assert controller.cost()["latency"].dense == pytest.approx(dense, rel=0.02)
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(x), x[:, :4].argmax(1))
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
    small = controller.finalize().eval()
    began = Ticks.now
    with torch.no_grad():
        small(x)
    assert Ticks.now - began <= 0.6 * dense * (1 + 1e-6)
    assert Ticks.now - began >= 0.35 * dense
    off = [name for name, mask in controller.masks.items() if name.startswith("layer") and not mask.any()]
    assert off


def test_less_than_no_branch_at_all_is_infeasible() -> None:
    model, x = Net(), torch.randn(64, 8)
    with pytest.raises(cp.InfeasibleBudget, match="latency") as raised:
        cp.attach(
            model,
            torch.optim.Adam(model.parameters()),
            budget=cp.Budget(latency=0.05),
            example_inputs=(x,),
            total_steps=40,
            granularity="layer",
            instruments=cp.Instruments(clock=Ticks.clock),
        )
    assert raised.value.ranges["latency"][0] == pytest.approx(1e-3, rel=0.02)
