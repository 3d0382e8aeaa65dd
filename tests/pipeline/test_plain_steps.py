"""Steps of which nothing is wanted take a short way through the controller: it changes nothing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import controlprune as cp
from controlprune.loop.intake import Intake

STEPS = 300


def run(each: Callable[[int, Any], None], policy: cp.Policy, budget: float = 0.5) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    x = torch.randn(STEPS, 8, 6)
    controller = cp.attach(
        model,
        optimizer,
        budget=cp.Budget(flops=budget),
        example_inputs=(x[0],),
        total_steps=STEPS,
        policy=policy,
    )
    for step in range(STEPS):

        def closure(step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[step]), x[step, :, :3].argmax(1))
            loss.backward()
            return loss

        each(step, (closure, optimizer, controller))
    state = controller.state_dict()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    controller.detach()
    for row in state["history"]["rows"]:
        row.pop("seconds")
        row.pop("overhead_seconds")
    return {key: value for key, value in state.items() if key not in ("seconds", "checksum")} | weights


def ordinary(step: int, of: Any) -> None:
    closure, optimizer, controller = of
    loss = closure()
    optimizer.step()
    controller.step(loss)


def with_closures(step: int, of: Any) -> None:
    closure, optimizer, controller = of
    optimizer.step(closure)
    controller.step()


def in_twos(step: int, of: Any) -> None:
    closure, optimizer, controller = of
    loss = closure()
    if step % 2:
        optimizer.step()
    controller.step(loss)


def with_gaps(step: int, of: Any) -> None:
    closure, optimizer, controller = of
    loss = closure()
    if step % 60 != 50:
        optimizer.step()
    controller.step(loss if step % 11 else math.nan)


def without_gradients(step: int, of: Any) -> None:
    closure, optimizer, controller = of
    loss = closure()
    if step % 13 == 0:
        optimizer.zero_grad()
    optimizer.step()
    controller.step(loss)


def by_hand(step: int, of: Any) -> None:
    ordinary(step, of)
    controller = of[2]
    if step == 50:
        controller.expand()
    if step == 120:
        controller.total_steps = STEPS + 100
    if step == 150:
        controller.budget = cp.Budget(flops=0.4)


LOOPS = (ordinary, with_closures, in_twos, with_gaps, without_gradients, by_hand)
POLICIES = (
    cp.Control(start="budget", observe_every=5, update_every=30),
    cp.Control(observe_every=7, shrink=False),
)


@pytest.mark.parametrize("each", LOOPS, ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("policy", POLICIES, ids=("shrinks", "masks"))
def test_the_short_way_is_as_the_long_one(
    each: Callable[[int, Any], None], policy: cp.Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    passed = Intake.passed

    def counted(self: Intake, loss: Any) -> bool:
        taken.append(passed(self, loss))
        return taken[-1]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # loops that go wrong are said to
        monkeypatch.setattr(Intake, "passed", counted)
        short = run(each, policy)
        monkeypatch.setattr(Intake, "passed", lambda self, loss: False)
        long = run(each, policy)
    assert any(taken) or each is in_twos
    assert short.keys() == long.keys()
    for key, value in long.items():
        assert (
            torch.equal(value, short[key]) if isinstance(value, torch.Tensor) else same(value, short[key])
        ), key


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, torch.Tensor):
        return torch.equal(one.nan_to_num(), other.nan_to_num())
    return one == other or (isinstance(one, float) and math.isnan(one) and math.isnan(other))


def test_most_steps_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    passed = Intake.passed
    monkeypatch.setattr(Intake, "passed", lambda self, loss: taken.append(passed(self, loss)) or taken[-1])
    run(ordinary, cp.Control(observe_every=10, update_every=50), budget=1.0)
    assert sum(taken) > 0.8 * STEPS
