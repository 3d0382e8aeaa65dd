"""The trade-off of one update under caution: what may move, what must be met.

    n̄        uniform allocation under the limits                      (allocate/uniform.py)
    ṽ        what units are worth as others go                        (saliency/worth.py)
    n, m     max Σ ṽ_i − λ·C(n)  with floors, holds and hysteresis    (allocate/knapsack.py)

At the budget no group loses more than `slew` units at once while it is under n̄ by as much; recently switched
units, and all dormant ones but the best `slew`, keep their state. Slew: an eighth of the group, at least one
width step. What was off stays off where units do not return (structure/groups.py).

A limit counts as filled when less than a tolerance of dense is left under it (`tolerances`): what the
cheapest unit costs, within [`NEAR`, `FAR`]; `FINE` of a run total, whose sum must come out; `ROUGH` of the
limit where the use is known by measuring only, and odd widths bought for the last per cent would be wasted.
Where none is filled, what keeps units from moving gives way: holds first, then the floors of the update.
Limits, prices: per resource, of the modelled use as a fraction of dense, and loss per dense use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..cost.problem import Problem
from ..structure.groups import widths_of
from .knapsack import Solution, Tradeoff, solve
from .uniform import uniform

__all__ = ["FAR", "Stand", "allocate", "floors", "held", "slew", "tolerances", "uniform_under"]

Values = tuple[NDArray[np.float64], ...]
NEAR, FAR, FINE, ROUGH = 0.009, 0.015, 0.004, 0.04


@dataclass(frozen=True)
class Stand:
    """Where the net is, and how freely it may move."""

    masks: tuple[Tensor, ...]
    young: Sequence[Tensor]  # recently switched, per group
    at_budget: bool  # few units move at a time
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
    even: tuple[int, ...],
    stand: Stand,
    limits: Mapping[str, float],
    prices: Mapping[str, float],
) -> Solution:
    """Masks and shadow prices: under the limits where there are any, else by the prices alone."""
    names, dense = tuple(problem.costs), np.array(list(problem.dense.values()))
    sizes, steps, masks = problem.structure.sizes, problem.steps, stand.masks
    returns = tuple(group.returns for group in problem.structure.groups)
    most = slew(sizes, steps)
    least = problem.floors
    if even and stand.at_budget:
        least = floors(least, even, widths_of(masks), most)
    bounds = np.array([limits.get(k, np.inf) for k in names]) * dense
    # dormant units are worth much the same: at a price they come back all at once, as many as may
    back = most if limits else np.maximum(np.array(steps), most // 2)
    tradeoff = Tradeoff(
        values=values,
        costs=tuple(problem.costs.values()),
        limits=bounds,
        prices=np.array([prices.get(k, 0.0) for k in names]) / dense,
        floors=least,
        steps=steps,
        grains=problem.grains,
        masks=tuple(m.numpy() for m in masks),
        held=held(values, masks, stand.young, back, returns),
        hysteresis=stand.hysteresis,
        tolerance=tolerances(problem, limits, min(max(_grain(problem), NEAR), FAR)),
        resources=names,
    )
    solution = solve(tradeoff)
    gone = (
        None if all(returns) else tuple(~m & ~r for m, r in zip(tradeoff.masks or (), returns, strict=True))
    )
    free, far = replace(tradeoff, held=gone), tolerances(problem, limits, FAR)
    for easier in (free, replace(free, floors=problem.floors)) if limits else ():
        if not (bounds - solution.costs > far * dense).all():
            break  # some limit is filled
        solution = solve(easier)
    return solution


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


def slew(sizes: Sequence[int], steps: Sequence[int]) -> NDArray[np.int64]:
    """Most units of each group that may move at one update."""
    return np.maximum(np.array(steps), np.array(sizes) // 8)


def floors(
    least: Sequence[int], even: Sequence[int], widths: Sequence[int], most: NDArray[np.int64]
) -> tuple[int, ...]:
    """Floors of an update at the budget: never under `least`, nor `most` units under the present widths."""
    slow = np.minimum(np.array(widths) - most, even)
    return tuple(int(n) for n in np.maximum(np.array(least), slow))


def held(
    values: Values,
    masks: Sequence[Tensor],
    young: Sequence[Tensor],
    most: NDArray[np.int64],
    returns: Sequence[bool],
) -> tuple[NDArray[np.bool_], ...]:
    """Units that keep their state at this update."""
    found: list[NDArray[np.bool_]] = []
    for v, mask, recent, back, may in zip(values, masks, young, most, returns, strict=True):
        hold, n = recent.numpy().copy(), back if may else 0
        dormant = np.flatnonzero(~mask.numpy())
        hold[dormant[np.argsort(-v[dormant], kind="stable")[n:]]] = True
        found.append(hold)
    return tuple(found)
