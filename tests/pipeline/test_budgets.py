"""Budgets in every unit on real runs: counted ones to the point, sums over the run, a changed mind."""

from __future__ import annotations

import sys
import time
import warnings

import pytest
import torch
from rig import QUICK, rig
from torch import Tensor, nn

import controlprune as cp
from controlprune.cost.flops import flops
from controlprune.cost.forward_time import Reading
from controlprune.granularity.channels import Channels
from controlprune.structure import analyse


@pytest.mark.parametrize("target", [0.4, 0.7])
def test_the_sum_of_a_run_ends_on_its_budget(target: float) -> None:
    run = rig("residual", budget=cp.Budget(train_flops=target), policy=cp.Control(), total_steps=400)
    run.train(0, 400)
    assert run.controller.cost()["train_flops"].fraction == pytest.approx(target, rel=0.01)


class Ticks:
    """Seconds by hand: every step of a net with `share` of the FLOPs takes fixed + (1 − fixed) share."""

    def __init__(self, fixed: float) -> None:
        self.now, self.fixed = 0.0, fixed

    def __call__(self) -> float:
        return self.now

    def step(self, share: float) -> None:
        self.now += self.fixed + (1.0 - self.fixed) * share


def timed(fixed: float, target: float, steps: int = 300) -> float:
    """The whole run's seconds over a dense run's."""
    ticks = Ticks(fixed)
    run = rig(
        "residual",
        budget=cp.Budget(train_time=target),
        policy=cp.Control(),
        total_steps=steps,
        instruments=cp.Instruments(clock=ticks),
    )
    for step in range(steps):
        run.train(step, step + 1)
        run.controller.shrink()  # for nets as small as these it would not pay
        ticks.step(run.controller._run.metering.use)
    return ticks() / steps


@pytest.mark.parametrize(("fixed", "target"), [(0.05, 0.6), (0.3, 0.6), (0.4, 0.6), (0.3, 0.5)])
def test_time_is_met_whatever_part_of_a_step_does_not_shrink(fixed: float, target: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert timed(fixed, target) == pytest.approx(target, rel=0.05)


def test_a_total_out_of_reach_is_said_and_approached() -> None:
    with pytest.warns(UserWarning, match=r"train_time cannot end at 0\.5 of a dense run"):
        assert 0.7 < timed(0.7, 0.5) < 0.8


def test_a_total_that_does_not_bind_moves_nothing() -> None:
    """Masks are those of the run without it; once they hold, they hold."""
    runs = []
    for budget in (cp.Budget(flops=0.4), cp.Budget(flops=0.4, train_flops=1.0)):
        run = rig("residual", budget=budget, policy=cp.Control(), total_steps=400)
        run.train(0, 400)
        runs.append(run.controller.history)
    without, beside = (sum(sum(r.on) + sum(r.off) for r in h if r.step > 300) for h in runs)
    assert without == beside == 0
    came_back = [sum(sum(r.on) for r in h) for h in runs]
    assert came_back[1] <= 2 * came_back[0] + 4


def test_several_budgets_are_all_met() -> None:
    budget = cp.Budget(flops=0.6, params=0.5, memory=0.7)
    run = rig("residual", budget=budget, policy=QUICK, total_steps=120)
    run.train(0, 120)
    run.controller.finalize()
    cost = run.controller.history[-1].realised
    assert cost["flops"] <= 0.6
    assert cost["params"] <= 0.5
    assert cost["memory"] <= 0.7


def test_a_changed_budget_is_followed_both_ways() -> None:
    run = rig("residual", budget=cp.Budget(flops=0.6), policy=QUICK, total_steps=240)
    seen = []
    for budget, stop in ((0.6, 120), (0.3, 160), (0.5, 200)):
        run.controller.budget = cp.Budget(flops=budget)
        run.train(run.controller.steps, stop)
        seen.append(run.controller.history[-1].realised["flops"])
    assert seen == [pytest.approx(r, abs=0.06) for r in (0.6, 0.3, 0.5)]
    assert all(use <= r * (1 + 1e-9) for use, r in zip(seen, (0.6, 0.3, 0.5), strict=True))


def test_what_was_asked_travels_with_the_state() -> None:
    run = rig("mlp", budget=cp.Budget(flops=0.6), total_steps=100)
    run.controller.budget = cp.Budget(flops=0.4, params=0.5)
    state = run.controller.state_dict()
    again = rig("mlp", budget=cp.Budget(flops=0.6), total_steps=100)
    again.controller.load_state_dict(state)
    assert again.controller.budget == cp.Budget(flops=0.4, params=0.5)


def test_a_budget_that_cannot_join_late_changes_nothing() -> None:
    run = rig("mlp", total_steps=100)
    for late in (cp.Budget(latency=0.5), cp.Budget(train_time=0.5)):
        with pytest.raises(ValueError, match="measured when attaching"):
            run.controller.budget = late
    assert run.controller.budget == cp.Budget(flops=0.5)


def test_latency_is_measured_and_fed_back() -> None:
    """On the process's own clock, and loosely: other work runs beside the tests."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 8)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(128, 256)
    controller = cp.attach(
        model,
        optimizer,
        budget=cp.Budget(latency=0.5),
        example_inputs=(x,),
        total_steps=60,
        policy=cp.Control(),
        instruments=cp.Instruments(clock=time.process_time),
    )
    for _ in range(60):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
    assert "latency: measured over modelled" in controller.report()
    controller.finalize()
    assert controller.history[-1].realised["latency"] <= 0.52


class Mixing(nn.Module):
    """Its first layer's work grows with the length of the input, its second's does not."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.last = nn.Linear(4, 32), nn.Linear(32, 24)
        self.head = nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.last(torch.relu(self.each(x)).mean(1))))


def test_a_latency_is_modelled_on_what_is_deployed() -> None:
    """The work of each operator is that of the deploy inputs, not the examples'."""
    model = Mixing()
    structure = analyse(model, (torch.zeros(2, 3, 4),))
    deployed = sys.modules["controlprune.loop.attach"]._deployed
    seen = deployed(Channels(), structure, model, (torch.zeros(1, 30, 4),), ())
    assert flops(structure).value((16, 8)) == 2 * (2 * 3 * 4 * 16 + 2 * 16 * 8 + 2 * 8 * 2)
    assert flops(seen).value((16, 8)) == 2 * (30 * 4 * 16 + 16 * 8 + 8 * 2)
    assert seen.groups == structure.groups
    assert seen.tensors == structure.tensors


def test_one_measurement_is_booked_once_whatever_it_tells() -> None:
    """Latency and joules are read in the same forwards, and both count what they cost."""
    run = rig("mlp", total_steps=100)
    metering = run.controller._run.metering
    reading = Reading({"latency": 0.5, "energy": 0.5}, 0.01, live=30, dense=60)

    class Both:
        resources = ("latency", "energy")

        def read(self, model: nn.Module) -> Reading:
            return reading

    metering.gauge = Both()  # type: ignore[assignment]
    whole = metering._work.value((32, 24))
    found = metering.laid_out((16, 12), run.model)
    assert [(m.resource, m.use) for m in found] == [("latency", 0.5), ("energy", 0.5)]
    live = metering._work.value((16, 12)) / whole
    assert metering.accounts._counts == pytest.approx((30 * live + 60) / 3)
