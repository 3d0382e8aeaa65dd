"""The planner's promises: not before `earliest`, under way by `latest`, at the budget by `deadline`."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlprune.control.ramp import Plan, PlanState


@dataclass(frozen=True)
class Loss:
    fast: float = 1.0
    scatter: float = 0.01
    slope: float = 0.0


SETTLED, FALLING = Loss(), Loss(slope=0.3)
TIMES = [t / 200 for t in range(201)]


def run(plan: Plan, losses, stability=1.0) -> list[float]:
    """Levels at TIMES; `losses` is one Loss or a function of τ."""
    state, levels = plan.init(), []
    for tau in TIMES:
        loss = losses(tau) if callable(losses) else losses
        state = plan.update(state, tau, loss, stability)
        levels.append(state.level)
    return levels


def start(levels: list[float]) -> float:
    """Last time at which nothing had been cut."""
    return max(tau for tau, level in zip(TIMES, levels, strict=True) if level == 1.0)


def test_settled_at_once_starts_at_the_earliest() -> None:
    plan = Plan(earliest=0.05, latest=0.3, deadline=0.6, duration=0.1)
    levels = run(plan, SETTLED)
    assert start(levels) == 0.05
    assert levels[TIMES.index(0.1)] == pytest.approx(0.5)  # half of the ramp
    assert levels[TIMES.index(0.155)] == pytest.approx(0.0)


@pytest.mark.parametrize(("loss", "stability"), [(FALLING, 1.0), (SETTLED, 0.0)])
def test_never_settled_starts_at_the_latest(loss, stability) -> None:
    plan = Plan(earliest=0.05, latest=0.3, deadline=0.6)
    levels = run(plan, loss, stability)
    assert start(levels) == 0.3
    assert levels[TIMES.index(0.6)] == 0.0


def test_starts_when_the_loss_settles() -> None:
    plan = Plan(earliest=0.05, latest=0.5, deadline=0.9)
    levels = run(plan, lambda tau: FALLING if tau < 0.2 else SETTLED)
    assert start(levels) == 0.2


def test_waits_while_the_loss_is_above_its_trend() -> None:
    """Loss 1 → 1.2 with single losses scattering by 0.1 (room 0.05): hold; then full speed again."""
    plan = Plan(earliest=0.1, latest=0.2, deadline=1.0, duration=0.1, tolerance=0.5)
    levels = run(plan, lambda tau: Loss(fast=1.2 if 0.15 < tau <= 0.2 else 1.0))
    held = [level for tau, level in zip(TIMES, levels, strict=True) if 0.15 <= tau <= 0.2]
    assert max(held) == min(held) == pytest.approx(0.5)
    assert levels[TIMES.index(0.255)] == pytest.approx(0.0)


def test_speed_falls_gradually_with_the_excess() -> None:
    plan = Plan(earliest=0.0, latest=0.5, deadline=1.0, duration=0.5, tolerance=1.0)

    def slope(excess: float) -> float:
        state = plan.update(plan.init(), 0.0, Loss(fast=1.0), 1.0)
        return (state.level - plan.update(state, 0.01, Loss(fast=1.0 + excess), 1.0).level) * 50

    assert [slope(x) for x in (0.0, 0.1, 0.15, 0.2, 1.0)] == pytest.approx([1, 1, 0.5, 0, 0])


def test_a_loss_that_never_heals_still_meets_the_deadline() -> None:
    plan = Plan(earliest=0.1, latest=0.2, deadline=0.7)
    levels = run(plan, lambda tau: Loss(fast=1.0 + 10 * (tau > 0.1)))
    assert levels[TIMES.index(0.7)] == 0.0
    assert levels[TIMES.index(0.45)] == pytest.approx(0.5)  # the slowest descent that is on time


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.5))
def test_promises_hold_whatever_the_loss_does(seed, a, b, c, duration) -> None:
    earliest, latest, deadline = sorted((a, b, c))
    plan = Plan(earliest, latest, deadline, duration)
    rng = np.random.default_rng(seed)

    def any_loss(tau: float) -> Loss:
        fast = rng.choice([rng.normal(), math.nan, math.inf, 1.0])
        return Loss(fast=fast, scatter=rng.exponential(), slope=rng.choice([rng.normal(), 0.0]))

    levels = run(plan, any_loss, stability=rng.random())
    assert all(later <= now for now, later in itertools.pairwise(levels))
    for tau, level in zip(TIMES, levels, strict=True):
        assert 0 <= level <= 1
        assert tau >= earliest or level == 1.0
        assert tau < deadline or level == 0.0


def test_limit_cases() -> None:
    assert run(Plan(earliest=0, latest=0, deadline=0), FALLING)[0] == 0.0  # start at the budget
    one_step = run(Plan(earliest=0.1, latest=0.1, deadline=0.5, duration=0), FALLING)
    assert sorted(set(one_step)) == [0.0, 1.0]
    assert one_step[TIMES.index(0.1)] == 0.0
    ramp = Plan(earliest=0.1, latest=0.1, deadline=1.0, duration=0.4, tolerance=math.inf)
    levels = run(ramp, lambda tau: Loss(fast=1 + 100 * tau, slope=1.0))
    assert levels == pytest.approx([min(1, max(0, 1 - (tau - 0.1) / 0.4)) for tau in TIMES])


def test_resumed_through_its_state() -> None:
    plan, whole = Plan(), run(Plan(), lambda tau: Loss(fast=1 + math.sin(20 * tau)))
    state, levels = plan.init(), []
    for i, tau in enumerate(TIMES):
        if i == 40:
            state = PlanState(state.level, state.progress, state.started, state.best)
        state = plan.update(state, tau, Loss(fast=1 + math.sin(20 * tau)), 1.0)
        levels.append(state.level)
    assert levels == whole


@pytest.mark.parametrize(
    "arguments",
    [{"earliest": 0.5}, {"latest": 0.9}, {"deadline": 1.2}, {"duration": -1.0}, {"flat": math.nan}],
)
def test_bad_settings(arguments) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}="):
        Plan(**arguments)
