"""On an accelerator the host never waits for the device between two updates, and twice at one, however large.

The device is a pretend one (chip.py): real values, every wait counted, tensors of two devices in one operator
refused. On a GPU tests/gpu runs the same under torch's own alarm.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from chip import Chip, chip, to_chip
from rig import QUICK
from torch import Tensor, nn
from workers import ranks

import controlprune as cp
from controlprune.structure.traced import Traced

STEPS = 16
PER_UPDATE = Counter({"to the host": 2})  # what the steps brought (losses, gate gradients); what weights are


def deep(groups: int) -> nn.Sequential:
    layers = [nn.Linear(4, 8)]
    for _ in range(groups - 1):
        layers += [nn.ReLU(), nn.Linear(8, 8)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(8, 3))


def batch(device: str) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(16, 4), torch.randint(3, (16,))
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True)


class Apart(nn.Module):
    """Its first half on one device, the second on another."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = deep(3), deep(2)
        self.between = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.one(x))
        return self.two(x.to(next(self.two.parameters()).device, non_blocking=True))


class Run:
    def __init__(self, device: Chip, model: nn.Module, traced: Traced, policy: cp.Control) -> None:
        self.device, self.model = device, model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)
        self.controller = cp.attach(
            model, self.optimizer, budget=cp.Budget(flops=0.5), example_inputs=traced, total_steps=STEPS,
            round_to=1, policy=policy,
        )  # fmt: skip

    def step(self) -> Counter[str]:
        """What was waited for."""
        with self.device.counted() as waits:
            x, y = batch("chip:0")
            out = self.model(x)
            loss = nn.functional.cross_entropy(out, y.to(out.device, non_blocking=True))
            loss.backward()
            self.optimizer.step()
            self.controller.step(loss)
            self.optimizer.zero_grad()
        return waits


def assert_no_waits(run: Run) -> set[bool]:
    """The layouts that were seen."""
    layouts = set()
    for step in range(1, STEPS + 1):
        if step == 13:
            with run.device.counted() as waits:
                run.controller.shrink()
            assert waits == Counter(), "shrink"
        updates = len(run.controller.history)
        waits = run.step()
        decided = len(run.controller.history) > updates
        assert waits <= (PER_UPDATE if decided else Counter()), f"step {step}"  # less: no norms
        layouts.add(run.controller.plant.compact)
    assert any(not mask.all() for mask in run.controller.masks.values())
    return layouts


@pytest.mark.parametrize("groups", [10, 40, pytest.param(200, marks=pytest.mark.slow)])
@ranks(1)
def test_waits_do_not_grow_with_the_model(rank: int, groups: int) -> None:
    with chip() as device:
        model = deep(groups)
        traced = cp.trace(model, (torch.zeros(2, 4),))
        assert len(traced.structure.groups) == groups
        policy = cp.Control(observe_every=1, update_every=2, revise_every=3, looks=1.0)
        run = Run(device, to_chip(model), traced, policy)
        assert assert_no_waits(run) == {False, True}
        run.controller.finalize()


@ranks(1)
def test_model_over_two_devices(rank: int) -> None:
    with chip() as device:
        model = Apart()
        traced = cp.trace(model, (torch.zeros(2, 4),))
        to_chip(model.one), to_chip(model.between)
        run = Run(device, model, traced, QUICK)
        for _ in range(STEPS):
            run.step()
        assert not run.controller.plant.compact
        homes = [spot.home for spot in run.controller.plant.spots if spot.home is not None]
        assert {home.device.type for home in homes} == {"chip", "cpu"}
        run.controller.finalize()
        assert run.controller.cost()["flops"].fraction <= 0.5
        run.model(batch("chip:0")[0])


@ranks(1)
def test_attached_there_and_parked_here(rank: int) -> None:
    with chip() as device:
        model = to_chip(deep(4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        inputs = (torch.zeros(2, 4, device="chip:0"),)
        controller = cp.attach(model, optimizer, budget=cp.Budget(flops=0.5), example_inputs=inputs,
                               total_steps=8, round_to=1, park_on="cpu", policy=QUICK)  # fmt: skip
        before = [p.detach().cpu() for p in model.parameters()]
        controller.set_masks({g.name: torch.arange(8) % 3 > 0 for g in controller.groups})
        with device.counted() as waits:
            controller.shrink()
        assert waits == Counter()
        homes = [spot.home for spot in controller.plant.spots if spot.home is not None]
        assert homes
        assert all(home.device.type == "cpu" for home in homes)
        with device.counted() as waits:
            controller.plant.weight_norms()
            controller.set_masks({g.name: torch.arange(8) % 2 > 0 for g in controller.groups})
            controller.expand()
            controller.shrink()
        assert waits == Counter()
        controller.detach()
        assert all(torch.equal(p.detach().cpu(), q) for p, q in zip(model.parameters(), before, strict=True))


@ranks(1)
def test_resumed_optimizer_state_waits_where_weights_do(rank: int) -> None:
    """Also where it comes before the optimizer's own."""
    with chip():
        controllers = []
        for _ in range(2):
            model = to_chip(deep(4))
            optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
            inputs = (torch.zeros(2, 4, device="chip:0"),)
            one = cp.attach(model, optimizer, budget=cp.Budget(flops=0.5), example_inputs=inputs,
                            total_steps=8, round_to=1, park_on="cpu", policy=QUICK)  # fmt: skip
            controllers.append(one)
            if len(controllers) == 1:
                model(inputs[0]).sum().backward()
                optimizer.step()
                one.set_masks({g.name: torch.arange(8) % 3 > 0 for g in one.groups})
                one.shrink()
        controllers[1].load_state_dict(controllers[0].state_dict())
        for one in controllers:
            homes = [home for spot in one.plant.spots for home in spot.state_home.values()]
            assert homes
            assert all(home.device.type == "cpu" for home in homes)


@ranks(1)
def test_the_pretend_device_tells(rank: int) -> None:
    with chip() as device:
        x = torch.ones(3, device="chip:0")
        with device.counted() as waits:
            float(x.sum())
            x.nonzero()
            x.cpu()
            torch.zeros(3).to("chip:0")
            x[x > 0]
        assert sum(waits.values()) == 5
        with pytest.raises(RuntimeError, match="tensors on chip:0 and cpu"):
            x + torch.ones(3)
