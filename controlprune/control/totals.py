"""Run totals by receding horizon: what every step may use so that the sum ends on the limit.

With the use per step as a fraction u(t) of a dense step, τ the part of the run that has passed, and limit and
spent as fractions of a dense run::

    limit = spent + ∫_τ^1 u dτ',      u = β + (1 − β) ℓ(τ')

The level ℓ is the planner's (1 dense, 0 budget). With its mean L over what is left, if the cut goes on as
planned, the only unknown is where the steps end up::

    f = (limit − spent) / (1 − τ)         mean use per step that is left
    β = (f − L) / (1 − L)

solved anew at every update from what was really spent, so that a late cut, a controller that costs time or a
machine that slows down are made up for in the rest of the run. L → 1 (no time left to cut) asks for dense if
f ≥ 1 and for nothing otherwise. Once the plan has come to its end, `steady` asks for a change of the use u
only where the sum would miss by more than `DEAD`, and never for more than fits into `SHORT`; from what was
asked for last, β′, it goes half the way::

    ε = limit − spent − u (1 − τ)
    β = u where |ε| ≤ DEAD · limit,  else  β′ + HALF (u + ε / max(1 − τ, SHORT) − β′)

u + ε / (1 − τ) is f. To go all the way is to be at the margin when a change does twice what it should: u then
swings from update to update. In the last steps the gain on ε stays bounded, and a small rest is not thrown at
them.

`hastened`: how much faster the plan must be (a factor on its times) for the end to be no lower than
`share` of the way from the smallest net to the mean, β ≥ least + share · (limit − least), so that a small
total is met by a moderate net cut early and not by a tiny one cut late. `least`: what a step of the smallest
net uses; much of the time of a step does not shrink.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["hastened", "mean_left", "rest", "steady"]

DEAD = 0.002  # of the limit
SHORT = 0.1
HALF = 0.5
STEPS = 40  # of the bisection


def mean_left(limit: float, spent: float, progress: float) -> float:
    """f; infinite when the run is over."""
    left = 1.0 - progress
    return (limit - spent) / left if left > 0 else float("inf")


def rest(mean: float, ahead: float) -> float:
    """β from f and L; at most 1, not bounded below (a total that can't be met asks for less than nothing)."""
    if ahead >= 1.0 - 1e-9:
        return 1.0 if mean >= 1.0 else -float("inf")
    return min(1.0, (mean - ahead) / (1.0 - ahead))


def steady(limit: float, spent: float, progress: float, use: float, asked: float | None = None) -> float:
    """β from the use per step now and what was asked for last (None: the same); between 0 and 1."""
    left = max(1.0 - progress, 0.0)
    error = limit - spent - use * left
    if abs(error) <= DEAD * limit:
        return min(use, 1.0)
    last = use if asked is None else asked
    return min(max(last + HALF * (use + error / max(left, SHORT) - last), 0.0), 1.0)


def hastened(limit: float, ahead: Callable[[float], float], least: float, share: float = 0.6) -> float:
    """The largest factor in (0, 1] on the plan's times with that β; `ahead(factor)` is L then."""
    wanted = least + share * (limit - least)
    if rest(limit, ahead(1.0)) >= wanted:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if rest(limit, ahead(middle)) >= wanted else (low, middle)
    return low
