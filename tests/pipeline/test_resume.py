"""Stopped at 100 and resumed for 100 more is 200 straight, bit by bit; and the same seed is the same run."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from rig import QUICK, Rig, assert_same_bits, bits, hooks, rig, timeless

import controlprune as cp

PLAN = cp.Plan(earliest=0.1, latest=0.15, duration=0.3, deadline=0.5)
RESTLESS = replace(QUICK, plan=PLAN, stages=6, revise_every=2, dwell=0, hysteresis=0.0)  # masks move a lot
ORDERS = list(itertools.permutations(("model", "optimizer", "controller")))


def saved(run: Rig) -> io.BytesIO:
    file = io.BytesIO()
    torch.save({name: getattr(run, name).state_dict() for name in ORDERS[0]}, file)
    return file


def load(run: Rig, file: io.BytesIO, order: tuple[str, ...]) -> None:
    file.seek(0)
    states: dict[str, Any] = torch.load(file, weights_only=True)
    for name in order:
        getattr(run, name).load_state_dict(states[name])


def assert_same_run(a: Rig, b: Rig) -> None:
    assert_same_bits(bits(a.model, a.optimizer), bits(b.model, b.optimizer))
    assert timeless(list(a.controller.history)) == timeless(list(b.controller.history))
    assert {n: m.tolist() for n, m in a.controller.masks.items()} == {
        n: m.tolist() for n, m in b.controller.masks.items()
    }
    assert (a.controller.steps, a.controller.skipped) == (b.controller.steps, b.controller.skipped)


def run(net: str, optimizer: str, layout: str, total_steps: int) -> Rig:
    at = total_steps * 3 // 10 if layout == "compact" else 0
    return rig(net, optimizer, policy=RESTLESS, total_steps=total_steps, shrink_at=at)


@pytest.mark.parametrize("layout", ["masked", "compact"])
@pytest.mark.parametrize(
    ("net", "optimizer", "half", "orders"),
    [("mlp", "adamw", 100, ORDERS[:1]), ("mlp", "sgd", 44, ORDERS), ("residual", "adam", 50, ORDERS[3:4])],
)
def test_a_hundred_and_a_hundred_are_two_hundred(
    net: str, optimizer: str, half: int, orders: list[tuple[str, ...]], layout: str
) -> None:
    straight = run(net, optimizer, layout, 2 * half)
    straight.train(0, half)
    file = saved(straight)
    assert any(not m.all() for m in straight.controller.masks.values())
    looking = straight.controller._run.policy.state_dict()["looks_until"] > 0
    assert (straight.controller.plant.compact or looking) == (layout == "compact")
    straight.train(half, 2 * half)
    assert any(any(row.on) for row in straight.controller.history if row.step > half)  # the parked matter
    for order in orders:
        resumed = run(net, optimizer, layout, 2 * half)
        load(resumed, file, order)
        resumed.train(half, 2 * half)
        assert_same_run(straight, resumed)
    straight.controller.detach()
    resumed.controller.detach()
    assert_same_bits(bits(straight.model, straight.optimizer), bits(resumed.model, resumed.optimizer))


@pytest.mark.parametrize("layout", ["masked", "compact"])
@pytest.mark.parametrize("order", ORDERS)
def test_back_to_a_checkpoint_within_the_run(order: tuple[str, ...], layout: str) -> None:
    """The masks have moved on meanwhile, at the same widths: nothing of them may stay."""
    straight = run("mlp", "adam", layout, 80)
    straight.train(0, 45)
    file = saved(straight)
    then = straight.controller.masks
    straight.train(45, 60)
    assert any((then[n] != m).any() for n, m in straight.controller.masks.items())
    end = bits(straight.model, straight.optimizer)
    load(straight, file, order)
    straight.train(45, 60)
    assert_same_bits(end, bits(straight.model, straight.optimizer))


@pytest.mark.parametrize("at", [1, 18, 23])
def test_anywhere_in_the_run(at: int) -> None:
    straight, resumed = (rig("residual", total_steps=50) for _ in range(2))
    straight.train(0, at)
    file = saved(straight)
    straight.train(at, 50)
    load(resumed, file, ("optimizer", "controller", "model"))
    resumed.train(at, 50)
    assert_same_run(straight, resumed)


def test_the_state_is_a_snapshot() -> None:
    """Neither saving nor loading shares memory with the run."""
    going = rig(total_steps=60)
    going.train(0, 40)
    state = going.controller.state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    model = {k: v.clone() for k, v in going.model.state_dict().items()}
    going.train(40, 55)
    other = rig(total_steps=60)
    other.controller.load_state_dict(state)
    other.model.load_state_dict(model)
    other.train(40, 55)
    again = io.BytesIO()
    torch.save(state, again)
    assert file.getvalue() == again.getvalue()


@pytest.mark.parametrize("net", ["mlp", "residual"])
def test_the_same_seed_is_the_same_run(net: str) -> None:
    runs = [rig(net, seed=seed, total_steps=40) for seed in (3, 3, 4)]
    for one in runs:
        one.train(0, 40)
    assert_same_run(runs[0], runs[1])
    assert timeless(list(runs[0].controller.history)) != timeless(list(runs[2].controller.history))
    smalls = [one.controller.finalize() for one in runs[:2]]
    assert_same_bits(bits(smalls[0], runs[0].optimizer), bits(smalls[1], runs[1].optimizer))


def test_a_resumed_run_finalizes_and_leaves_no_hooks() -> None:
    first, resumed = rig(total_steps=60), rig(total_steps=60)
    first.train(0, 40)
    load(resumed, saved(first), ("model", "optimizer", "controller"))
    resumed.train(40, 60)
    seconds = [row.seconds for row in resumed.controller.history]
    assert seconds == sorted(seconds)
    resumed.controller.finalize()
    assert hooks(resumed.model, resumed.optimizer) == 0
