"""The regulator against its recurrence written by hand, its limit cases, and the real solver as plant."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlprune.allocate.knapsack import Tradeoff, solve
from controlprune.cost.polynomial import Polynomial
from controlprune.price.pi import PI, PIState
from controlprune.structure.extents import Fixed, Units

errors_strategy = st.lists(st.floats(-1, 1), min_size=1, max_size=60)
INF = float("inf")


def run(regulator: PI, errors: list[float]) -> list[float]:
    state, prices = regulator.init(), []
    for error in errors:
        state = regulator.update(state, error)
        prices.append(state.price)
    return prices


@settings(max_examples=60, deadline=None)
@given(errors_strategy, st.floats(0, 2), st.floats(0, 2), st.floats(-0.9, 0.9), st.booleans())
def test_recurrence_by_hand(errors, k_i, k_p, nu, log_scale) -> None:
    low, high = (0.01, 50.0) if log_scale else (0.0, 50.0)
    regulator = PI(k_i, k_p, nu, initial=1.0, low=low, high=high, log_scale=log_scale)
    price, xi = 1.0, errors[0]
    expected = []
    for e in errors:
        new = nu * xi + (1 - nu) * e
        change = k_i * e + k_p * (new - xi)
        price = price * math.exp(change) if log_scale else price + change
        price, xi = min(max(price, low), high), new
        expected.append(price)
    assert run(regulator, errors) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(errors_strategy)
def test_dual_ascent_is_a_limit_case(errors) -> None:
    """K_P = 0, linear: λ ← [λ + K_I e]₊, exactly."""
    price, expected = 0.5, []
    for e in errors:
        price = max(0.0, price + 0.1 * e)
        expected.append(price)
    assert run(PI(0.1, 0.0, 0.0, initial=0.5, low=0.0, high=1e6, log_scale=False), errors) == expected


def test_plain_pi_in_closed_form() -> None:
    errors = list(np.random.default_rng(0).uniform(-0.1, 0.1, 50))
    regulator = PI(0.7, 0.4, 0.0, initial=1.0)
    last = math.log(run(regulator, errors)[-1])
    assert last == pytest.approx(0.7 * sum(errors) + 0.4 * (errors[-1] - errors[0]), rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=200, max_size=200))
def test_100_and_100_more_are_200(errors) -> None:
    regulator = PI(0.5, 0.3, 0.4)
    first = regulator.init()
    for error in errors[:100]:
        first = regulator.update(first, error)
    resumed = PIState(first.price, first.smoothed)
    for error in errors[100:]:
        resumed = regulator.update(resumed, error)
    straight = regulator.init()
    for error in errors:
        straight = regulator.update(straight, error)
    assert resumed == straight


def test_no_windup() -> None:
    """After a thousand updates against the stop the price leaves it at the first error the other way."""
    regulator = PI(0.5, 0.2, 0.0, initial=1.0, low=0.01, high=10.0)
    state = regulator.init()
    for _ in range(1000):
        state = regulator.update(state, 1.0)
    assert state.price == 10.0
    state = regulator.update(state, -0.2)
    assert state.price < 10.0 * math.exp(-0.5 * 0.2)


def test_tracking_is_bumpless() -> None:
    """While another mechanism sets the price the state follows it, and goes on from there."""
    regulator = PI(0.5)
    state = regulator.init()
    for _ in range(5):
        state = regulator.update(state, 0.3, applied=2.5)
    assert state.price == 2.5
    assert regulator.update(state, 0.0).price == pytest.approx(2.5)
    assert regulator.update(state, 0.0, applied=0.0).price == regulator.low


def test_non_finite_error_is_skipped() -> None:
    regulator = PI()
    state = regulator.update(regulator.init(), 0.2)
    assert regulator.update(state, math.nan) is state
    assert regulator.update(state, math.inf) is state


@pytest.mark.parametrize(
    "arguments",
    [
        {"integral": -1.0},
        {"proportional": math.nan},
        {"smoothing": 1.0},
        {"low": 0.0},
        {"initial": 1e9},
        {"high": math.inf},
    ],
)
def test_bad_settings(arguments) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}="):
        PI(**arguments)


class Net:
    """The real solver as the plant: price (loss per dense use) -> fraction of dense FLOPs."""

    def __init__(self, seed: int = 0, sizes: tuple[int, ...] = (40, 50)) -> None:
        rng = np.random.default_rng(seed)
        dims = [Fixed(16), *(Units(g, n) for g, n in enumerate(sizes)), Fixed(10)]
        self.cost = Polynomial.of([(2.0, pair) for pair in itertools.pairwise(dims)], len(sizes))
        self.dense = self.cost.value(sizes)
        self.values = tuple(rng.lognormal(sigma=1.0, size=n) / sum(sizes) for n in sizes)
        self.masks = tuple(np.ones(n, bool) for n in sizes)

    def use(self, price: float) -> float:
        ones = tuple(1 for _ in self.values)
        solution = solve(
            Tradeoff(
                values=self.values,
                costs=(self.cost,),
                limits=np.array([INF]),
                prices=np.array([price / self.dense]),
                floors=ones,
                steps=ones,
                masks=self.masks,
            )
        )
        self.masks = solution.masks
        return float(solution.costs[0]) / self.dense


def closed_loop(regulator: PI, reference: list[float], net: Net) -> tuple[list[float], list[float]]:
    state, use, prices = regulator.init(), [], []
    for r in reference:
        use.append(net.use(state.price))
        prices.append(state.price)
        state = regulator.update(state, use[-1] - r)
    return use, prices


def test_closed_loop_follows_a_ramp_down_to_the_budget() -> None:
    reference = [max(0.4, 1 - 0.02 * t) for t in range(120)]
    use, _ = closed_loop(PI(integral=1.16, initial=0.1), reference, Net())
    assert abs(np.mean(use[-30:]) - 0.4) < 0.01  # no steady-state error
    lag = np.array(use[10:30]) - np.array(reference[10:30])
    assert np.abs(lag).max() < 0.15


def test_closed_loop_recovers_from_saturation() -> None:
    """An unreachable reference drives the price to its stop; a reachable one is then met at once again."""
    regulator = PI(integral=1.16, initial=1.0, high=8.0)
    saturated, _ = closed_loop(regulator, [0.0] * 100, Net())
    use, prices = closed_loop(regulator, [0.0] * 100 + [0.5] * 40, Net())
    assert prices[99] == 8.0
    assert min(saturated) > 0  # the floors
    assert prices[101] < 8.0
    assert abs(np.mean(use[-15:]) - 0.5) < 0.02
