"""The trade-off of one update: what may move, what must be met.

    n̄        uniform allocation under the limits                      (allocate/uniform.py)
    ṽ        what units are worth as others go                        (saliency/worth.py)
    n, m     max Σ ṽ_i − λ·C(n)  with hysteresis                      (allocate/knapsack.py)

Under limits any unit may move. Where a price decides alone, recently switched units keep their state, and all
dormant ones but the best `BACK` of their group (at least one width step): dormant units are worth much the
same, and come back all at once when the price falls below that. What was off stays off where units do not
return (structure/groups.py).

A limit counts as filled when less than a tolerance of dense is left under it (`tolerances`): what the
cheapest unit costs, within [`NEAR`, `FAR`]; `FINE` of a run total, whose sum must come out; `ROUGH` of the
limit where the use is known by measuring only, and odd widths bought for the last per cent would be wasted.
Limits, prices: per resource, of the modelled use as a fraction of dense, and loss per dense use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..cost.problem import Problem
from .knapsack import Solution, Tradeoff, solve
from .uniform import uniform

__all__ = ["FAR", "Stand", "allocate", "held", "tolerances", "uniform_under"]

Values = tuple[NDArray[np.float64], ...]
NEAR, FAR, FINE, ROUGH = 0.009, 0.015, 0.004, 0.04
BACK = 1 / 16  # of a group, at a price


@dataclass(frozen=True)
class Stand:
    """Where the net is, and how freely it may move."""

    masks: tuple[Tensor, ...]
    young: Sequence[Tensor]  # recently switched, per group
    hysteresis: float


def uniform_under(problem: Problem, limits: Mapping[str, float]) -> tuple[int, ...]:
    """n̄; empty where nothing is to be met."""
    if not limits:
        return ()
    costs = [problem.costs[k] for k in limits]
    bounds = np.array([r * problem.dense[k] for k, r in limits.items()])
    sizes, floors, steps = problem.structure.sizes, problem.floors, problem.steps
    whole = tuple(max(floor, 1) for floor in floors)  # nothing vanishes that need not
    if whole != floors and all(c.value(whole) <= b for c, b in zip(costs, bounds, strict=True)):
        floors = whole
    return uniform(sizes, costs, bounds, floors, steps)


def allocate(
    problem: Problem,
    values: Values,
    stand: Stand,
    limits: Mapping[str, float],
    prices: Mapping[str, float],
) -> Solution:
    """Masks and shadow prices: under the limits where there are any, else by the prices alone."""
    names, dense = tuple(problem.costs), np.array(list(problem.dense.values()))
    returns = tuple(group.returns for group in problem.structure.groups)
    if limits:
        stay = tuple(~m.numpy() & (not back) for m, back in zip(stand.masks, returns, strict=True))
    else:
        stay = held(problem, values, stand, returns)
    return solve(
        Tradeoff(
            values=values,
            costs=tuple(problem.costs.values()),
            limits=np.array([limits.get(k, np.inf) for k in names]) * dense,
            prices=np.array([prices.get(k, 0.0) for k in names]) / dense,
            floors=problem.floors,
            steps=problem.steps,
            grains=problem.grains,
            masks=tuple(m.numpy() for m in stand.masks),
            held=stay,
            hysteresis=stand.hysteresis,
            tolerance=tolerances(problem, limits, min(max(_grain(problem), NEAR), FAR)),
            resources=names,
        )
    )


def tolerances(problem: Problem, limits: Mapping[str, float], counted: float) -> NDArray[np.float64]:
    """[K], fractions of dense; `counted`: of what is known exactly."""

    def of(name: str) -> float:
        if name in problem.totals:
            return FINE
        return ROUGH * limits.get(name, 1.0) if name in problem.measured else counted

    return np.array([of(name) for name in problem.costs])


def _grain(problem: Problem) -> float:
    """What the cheapest unit of the dense net costs, fraction of dense, where that is most."""
    sizes, dense = np.array(problem.structure.sizes), problem.dense
    ones = np.ones(len(sizes))
    return max(float(c.marginals(sizes, ones).min()) / dense[k] for k, c in problem.costs.items())


def held(
    problem: Problem, values: Values, stand: Stand, returns: Sequence[bool]
) -> tuple[NDArray[np.bool_], ...]:
    """Units that keep their state at this update of a price, per group."""
    found: list[NDArray[np.bool_]] = []
    groups = zip(values, stand.masks, stand.young, problem.steps, returns, strict=True)
    for v, mask, recent, step, may in groups:
        hold, back = recent.numpy().copy(), max(step, int(BACK * len(v))) if may else 0
        dormant = np.flatnonzero(~mask.numpy())
        hold[dormant[np.argsort(-v[dormant], kind="stable")[back:]]] = True
        found.append(hold)
    return tuple(found)
