"""The receding-horizon planner: exact doses, limit cases, promises, and a plant it does not know."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from controlprune.control.horizon import Horizon, HorizonState, doses

TIMES = [t / 100 for t in range(101)]


@dataclass(frozen=True)
class Loss:
    fast: float = 1.0
    scatter: float = 0.0
    slope: float = 0.0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 10), st.floats(0.01, 1))
def test_doses_are_optimal(seed, bend, amount) -> None:
    linear = np.random.default_rng(seed).normal(size=6)
    found = doses(linear, bend, amount)

    def cost(d):
        return linear @ d + bend / 2 * d @ d

    other = minimize(
        cost,
        np.full(6, amount / 6),
        jac=lambda d: linear + bend * d,
        bounds=[(0, None)] * 6,
        constraints={"type": "eq", "fun": lambda d: d.sum() - amount, "jac": lambda d: np.ones(6)},
        method="SLSQP",
    )
    assert found.sum() == pytest.approx(amount)
    assert found.min() >= 0
    assert cost(found) <= other.fun + 1e-6


def run(
    horizon: Horizon, stability=lambda tau: 1.0, heal=0.9, damage=0.5
) -> tuple[list[float], HorizonState]:
    """Levels on a plant with loss 1 + h, h ← heal h + damage dose."""
    state, levels, h = horizon.init(), [], 0.0
    for tau in TIMES:
        state = horizon.update(state, tau, Loss(1.0 + h), stability(tau))
        h = heal * h + damage * state.dose
        levels.append(state.level)
    return levels, state


def middle(levels: list[float]) -> float:
    """When half of the way is done."""
    return next(tau for tau, level in zip(TIMES, levels, strict=True) if level <= 0.5)


def test_limit_cases() -> None:
    base = Horizon(earliest=0.1, deadline=0.6)
    at_once, _ = run(replace(base, saving=1e6))
    assert at_once[TIMES.index(0.09)] == 1.0
    assert at_once[TIMES.index(0.1)] == 0.0
    harmless, _ = run(replace(base, damage=1e-9))
    assert harmless[TIMES.index(0.1)] == pytest.approx(0.0, abs=1e-6)
    even = replace(base, saving=0.0, mistrust=0.0, healing=1.0)
    plan = even.plan(replace(even.init(), progress=0.1), 0.01, 1.0)
    assert plan == pytest.approx(np.full(50, 1 / 50))
    waiting = replace(base, saving=0.0, mistrust=1e6)
    plan = waiting.plan(replace(waiting.init(), progress=0.1), 0.01, 0.0)
    assert plan[-1] == pytest.approx(1.0, abs=1e-3)


def test_compute_that_is_worth_more_is_saved_earlier() -> None:
    times = [middle(run(Horizon(saving=saving))[0]) for saving in (0.0, 0.3, 1.0, 5.0)]
    assert times == sorted(times, reverse=True)
    assert times[0] > times[-1]


def test_values_that_do_not_settle_are_waited_for() -> None:
    settled, _ = run(Horizon(mistrust=2.0))
    doubtful, _ = run(Horizon(mistrust=2.0), stability=lambda tau: min(1.0, tau / 0.3))
    assert middle(doubtful) > middle(settled)


def test_run_total_is_met() -> None:
    for total in (0.6, 0.7, 0.8):
        _, state = run(Horizon(saving=0.0, budget=0.4, total=total, earliest=0.0))
        assert state.spent <= total + 0.01
    free, state = run(Horizon(saving=0.0, budget=0.4, total=1.0, earliest=0.0))
    assert free == run(Horizon(saving=0.0, budget=0.4, earliest=0.0))[0]
    impossible, _ = run(Horizon(saving=0.0, budget=0.4, total=0.3, earliest=0.0))
    assert impossible[0] == pytest.approx(0.0, abs=1e-3)


def test_the_plant_is_identified() -> None:
    _, state = run(Horizon(forgetting=1.0), heal=0.7, damage=0.2)
    assert Horizon().response(state) == pytest.approx((0.7, 0.2), rel=0.1)


@pytest.mark.parametrize(("heal", "damage"), [(0.7, 0.1), (0.97, 0.1), (0.995, 1.0)])
def test_not_worse_than_fixed_curves_on_a_plant_it_does_not_know(heal, damage) -> None:
    """Its own objective, evaluated on the true plant: against a step and two ramps, 10 % of room."""
    horizon = Horizon(earliest=0.05, deadline=0.5, saving=0.3, mistrust=0.0)
    levels, _ = run(horizon, heal=heal, damage=damage)
    curves = [
        [1.0 if tau < 0.05 else max(0.0, 1 - (tau - 0.04) / length) for tau in TIMES]
        for length in (0.01, 0.2, 0.46)
    ]

    def cost(levels: list[float]) -> float:
        given = -np.diff([1.0, *levels])
        left = 1 - np.array(TIMES)
        harm = damage * (given * heal ** (left / 0.01)).sum() + horizon.bend * damage / 2 * (given**2).sum()
        return float(harm - horizon.saving * (1 - horizon.budget) * (given * left).sum())

    assert cost(levels) <= min(map(cost, curves)) + 0.1 * abs(min(map(cost, curves)))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1), st.floats(0, 100), st.floats(0, 100))
def test_promises_hold_whatever_the_loss_does(seed, a, b, saving, mistrust) -> None:
    earliest, deadline = sorted((a, b))
    horizon = Horizon(earliest, deadline, saving, mistrust)
    rng = np.random.default_rng(seed)
    state, before = horizon.init(), 1.0
    for tau in TIMES:
        fast = float(rng.choice([rng.normal(), math.nan, math.inf, 1.0]))
        state = horizon.update(state, tau, Loss(fast), rng.random())
        assert 0 <= state.level <= before
        assert tau >= earliest or state.level == 1.0
        assert tau < deadline or state.level == 0.0
        before = state.level


@pytest.mark.parametrize(
    "arguments",
    [
        {"earliest": 0.6},
        {"deadline": 1.5},
        {"bend": 0.0},
        {"saving": -1.0},
        {"healing": 0.0},
        {"settling": math.nan},
    ],
)
def test_bad_settings(arguments) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}="):
        Horizon(**arguments)
