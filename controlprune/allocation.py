"""Allocations that need no values: what is feasible, the uniform one, and values that lead to it.

**Feasible range.** Costs rise with every width, so C_k(n) lies between C_k(floors) and C_k(sizes).

**Uniform.** The same fraction f of every group: n_g(f) = the allowed width nearest to f·N_g, with the
largest f that keeps every C_k(n(f)) ≤ r_k. It is what is known to work when values are not trusted.

**Prior.** Concave values whose best allocation is a given one, n̄ (uncertain values are shrunk towards
them). With marginal prices c_g = Σ_k λ_k ∂C_k/∂n_g(n̄) and f_g = n̄_g / N_g, the j-th best unit of g gets::

    v_g(j) = c_g · ψ_g((j − ½)/N_g),        ψ_g(x) = (f_g / x)²          (ψ_g(f_g) = 1)

so ∂V_g/∂n_g = c_g at n̄: the first-order condition of `max Σ V_g(n_g) − λ·C(n)`. It is the only maximum
of the relaxed problem: in y = log n every cost is a sum of exponentials, so {C ≤ r} is convex, and
V_g ∝ −1/n_g is strictly concave in y (geometric programming).

Widths in units, costs in the resource's unit, prices in loss per that unit, values in loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .budget import InfeasibleBudget
from .cost.polynomial import Polynomial

__all__ = ["feasible_range", "ladder", "prior_values", "require_feasible", "uniform"]


def ladder(size: int, floor: int, step: int) -> NDArray[np.int64]:
    """Allowed widths of a group, ascending: the floor, multiples of the step above it, and dense."""
    multiples = np.arange(-(-floor // step) * step, size, step, dtype=np.int64)
    return np.unique(np.concatenate([[floor], multiples, [size]])).astype(np.int64)


def feasible_range(
    costs: Sequence[Polynomial], floors: Sequence[int], sizes: Sequence[int]
) -> tuple[tuple[float, float], ...]:
    """(least, dense) of every cost."""
    return tuple((cost.value(floors), cost.value(sizes)) for cost in costs)


def require_feasible(
    costs: Sequence[Polynomial],
    limits: ArrayLike,
    floors: Sequence[int],
    sizes: Sequence[int],
    resources: Sequence[str] = (),
) -> tuple[tuple[float, float], ...]:
    """The feasible range; `InfeasibleBudget` if a limit lies below it."""
    ranges = feasible_range(costs, floors, sizes)
    names = list(resources) or [f"cost {k}" for k in range(len(costs))]
    low = [
        f"{name} <= {limit:.6g} (feasible: {least:.6g} to {dense:.6g}, i.e. {least / dense:.4f} of dense up)"
        for name, limit, (least, dense) in zip(names, np.asarray(limits, float), ranges, strict=True)
        if not limit >= least
    ]
    if low:
        raise InfeasibleBudget(
            f"the budget cannot be met: {'; '.join(low)}; raise the budget or lower the floors",
            dict(zip(names, ranges, strict=True)),
        )
    return ranges


def uniform(
    sizes: Sequence[int],
    costs: Sequence[Polynomial],
    limits: ArrayLike,
    floors: Sequence[int],
    steps: Sequence[int],
) -> tuple[int, ...]:
    """Widths n_g(f) at the largest common fraction f that meets every limit."""
    require_feasible(costs, limits, floors, sizes)
    bounds = np.asarray(limits, float)
    ladders = [ladder(n, floor, step) for n, floor, step in zip(sizes, floors, steps, strict=True)]
    midpoints = [(rungs[1:] + rungs[:-1]) / (2 * n) for rungs, n in zip(ladders, sizes, strict=True)]
    fractions = np.unique(np.concatenate([np.zeros(1), *midpoints]))  # where some width changes

    def widths(i: int) -> tuple[int, ...]:
        f = fractions[i]
        return tuple(
            int(rungs[np.searchsorted(middle, f, side="right")])
            for rungs, middle in zip(ladders, midpoints, strict=True)
        )

    low, high = 0, len(fractions)  # widths(low) meets the limits, widths(high) does not
    while high - low > 1:
        middle = (low + high) // 2
        meets = all(cost.value(widths(middle)) <= r for cost, r in zip(costs, bounds, strict=True))
        low, high = (middle, high) if meets else (low, middle)
    return widths(low)


def prior_values(
    widths: Sequence[int], costs: Sequence[Polynomial], sizes: Sequence[int], prices: ArrayLike
) -> tuple[NDArray[np.float64], ...]:
    """v_g(j) for j = 1 … N_g, descending, per group: `widths` is their best allocation at `prices`."""
    lambdas = np.asarray(prices, float)
    ones = np.ones(len(sizes))
    at = np.asarray(widths, float)
    marginal = np.zeros(len(sizes))
    for price, cost in zip(lambdas, costs, strict=True):
        marginal += price * (cost.marginals(at, ones) - cost.marginals(at, -ones)) / 2
    return tuple(
        c * (n / (np.arange(1, size + 1) - 0.5)) ** 2 for c, n, size in zip(marginal, at, sizes, strict=True)
    )
