"""The trade-off: which units are worth their cost. Pure: values, costs, limits and prices -> masks.

    maximise   Σ_g V_g(n_g) − Σ_k λ_k C_k(n)      over widths n
    subject to C_k(n) ≤ r_k,   floor_g ≤ n_g ≤ N_g,   n_g on the ladder of g

V_g(n) is the sum of the n largest values of group g (loss), C_k a polynomial in the widths (FLOPs,
elements, …), λ_k a given price (loss per unit of the resource), r_k a limit (inf: none). A predicted
value below zero is noise about zero and counts as zero; ties go to the wider net, so that at λ = 0 a
limit is filled. An active unit's value counts (1 + hysteresis) times; a held unit keeps its state (active
ones: at a price, as a limit may need their cost).

Costs are multilinear, so units are not independent: every move is judged by the cost at the widths where it
is made. The search (allocate/search.py) solves the first-order condition, then takes width steps greedily
by value per cost, swaps (one group up, another down), and enumerates a window of widths around the best
result: the whole problem if it is small (≤ 8192 width vectors), which is then exact. If coarse steps end
more than `tolerance` of dense under the limit, single groups take finer steps (half, quarter, …, 1).

The shadow price of a binding limit is the loss per unit of the resource at the margin, from the values
and costs of the moves next to the solution.

Error: exact on small problems; elsewhere against brute force see tests/allocate/test_knapsack.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..control.nnls import nnls
from ..cost.grid import ladder
from ..cost.polynomial import Polynomial
from ..cost.problem import require_feasible
from .moves import Array, Rungs, Space, moves_from
from .search import search

__all__ = ["Solution", "Tradeoff", "solve"]

Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Tradeoff:
    """One trade-off. Arrays are per group (`values[g]`: [N_g]) or per resource (`limits`: [K])."""

    values: tuple[NDArray[np.float64], ...]
    costs: tuple[Polynomial, ...]
    limits: NDArray[np.float64]  # absolute, inf: no limit
    prices: NDArray[np.float64]  # loss per unit of resource
    floors: tuple[int, ...]
    steps: tuple[int, ...]  # widths are multiples of these, or the floor, or dense
    grains: tuple[int, ...] | None = None  # finer steps are multiples of these; None: 1
    masks: tuple[Bools, ...] | None = None  # current state; None: all active
    held: tuple[Bools, ...] | None = None  # units that keep their state; None: none
    hysteresis: float = 0.0
    # how far under a limit (fraction of dense) is near enough; of all resources, or one by one
    tolerance: NDArray[np.float64] | float = 0.015
    resources: tuple[str, ...] = ()  # names, for errors

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("values=(): there is no group to choose units in")
        for name in ("values", "floors", "steps", "grains", "masks", "held"):
            entries = getattr(self, name)
            if entries is not None and len(entries) != len(self.values):
                raise ValueError(f"{name}: {len(entries)} entries for {len(self.values)} groups")
        for name in ("limits", "prices"):
            given = getattr(self, name)
            if np.shape(given) != (len(self.costs),) or np.any(np.isnan(given)) or np.any(given < 0):
                raise ValueError(
                    f"{name}={given!r}: give one number >= 0 for each of {len(self.costs)} costs"
                )
        if self.hysteresis < 0:
            raise ValueError(f"hysteresis={self.hysteresis!r}: give a number >= 0")
        for g, (v, floor, step) in enumerate(zip(self.values, self.floors, self.steps, strict=True)):
            if not np.all(np.isfinite(v)):
                raise ValueError(
                    f"values[{g}]: {int((~np.isfinite(v)).sum())} are not finite; skip this update"
                )
            if not 0 <= floor <= len(v) or step < 1:
                raise ValueError(
                    f"group {g}: floor={floor}, step={step}: need 0 <= floor <= {len(v)}, step >= 1"
                )

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(len(v) for v in self.values)


@dataclass(frozen=True, eq=False)
class Solution:
    """What `solve` returns; `objective` counts clipped values, without the hysteresis bonus."""

    masks: tuple[Bools, ...]
    widths: tuple[int, ...]
    costs: NDArray[np.float64]  # C_k at the widths
    prices: NDArray[np.float64]  # given price + shadow price of the limit
    objective: float
    ranges: tuple[tuple[float, float], ...]  # (least, dense) of every cost


@dataclass(frozen=True, eq=False)
class _Ordered:
    """A group with its units in the order in which they are taken."""

    order: NDArray[np.intp]  # unit numbers: held active, free by value, held dormant
    worth: NDArray[np.float64]  # V(0 … N), with the hysteresis bonus
    rungs: NDArray[np.int64]  # allowed widths


def solve(tradeoff: Tradeoff) -> Solution:
    """Masks and widths of the trade-off; `InfeasibleBudget` if the floors alone exceed a limit."""
    ranges = require_feasible(
        tradeoff.costs, tradeoff.limits, tradeoff.floors, tradeoff.sizes, tradeoff.resources
    )
    groups = [_ordered(tradeoff, g) for g in range(len(tradeoff.values))]
    space = Space.of(
        ladders=[group.rungs for group in groups],
        curves=[group.worth for group in groups],
        costs=tradeoff.costs,
        limits=tradeoff.limits,
        prices=tradeoff.prices,
        dense=np.array([dense for _, dense in ranges]),
        tolerance=tradeoff.tolerance,
    )
    current = tradeoff.sizes if tradeoff.masks is None else tuple(int(m.sum()) for m in tradeoff.masks)
    space, at = search(
        space, np.array(current), max(tradeoff.steps), tradeoff.grains or (1,) * len(tradeoff.steps)
    )
    widths = space.rungs[at]
    masks = tuple(_mask(group.order, n) for group, n in zip(groups, widths, strict=True))
    costs = np.array([cost.value(widths) for cost in tradeoff.costs])
    kept = sum(float(np.maximum(v[m], 0).sum()) for v, m in zip(tradeoff.values, masks, strict=True))
    return Solution(
        masks=masks,
        widths=tuple(int(n) for n in widths),
        costs=costs,
        prices=tradeoff.prices + _shadow_prices(space, at),
        objective=kept - float(tradeoff.prices @ costs),
        ranges=ranges,
    )


def _ordered(tradeoff: Tradeoff, g: int) -> _Ordered:
    """Units of group g by value, and the widths that holds leave open (holds give way to the ladder)."""
    size = len(tradeoff.values[g])
    nobody = np.zeros(size, dtype=bool)
    active = ~nobody if tradeoff.masks is None else np.asarray(tradeoff.masks[g], bool)
    held = nobody if tradeoff.held is None else np.asarray(tradeoff.held[g], bool)
    value = np.maximum(tradeoff.values[g], 0) * np.where(active, 1 + tradeoff.hysteresis, 1.0)
    place = np.where(held, np.where(active, 0, 2), 1)
    order = np.lexsort((~active, -tradeoff.values[g], -value, place))
    rungs = ladder(size, tradeoff.floors[g], tradeoff.steps[g])
    low = rungs[min(np.searchsorted(rungs, int((held & active).sum())), len(rungs) - 1)]
    high = rungs[max(np.searchsorted(rungs, size - int((held & ~active).sum()), side="right") - 1, 0)]
    inside = (rungs >= low) & (rungs <= max(low, high))
    return _Ordered(order, np.concatenate([[0.0], np.cumsum(value[order])]), rungs[inside])


def _mask(order: NDArray[np.intp], width: int) -> Bools:
    mask = np.zeros(len(order), dtype=bool)
    mask[order[:width]] = True
    return mask


def _shadow_prices(space: Space, at: Rungs) -> Array:
    """Loss per unit of each binding resource at the margin: `ΔN_g ≈ Σ_k λ_k ΔC_k` over the next moves.

    Non-negative least squares over groups that could move both ways (any way, if there is none), each
    row divided by its cost; 0 for a resource whose limit would let every next rung up pass.
    """
    rise, fall = moves_from(space, at, 1, 1), moves_from(space, at, -1, 1)
    slack = space.limits - space.resources(at)
    binding = (rise.cost[:, :, 0] > slack[:, None]).any(axis=1)
    out = np.zeros(len(space.costs))
    if not binding.any():
        return out
    can = [moves.units[:, 0] > 0 for moves in (rise, fall)]
    inner = can[0] & can[1]
    rows = [(m, inner if inner.any() else c) for m, c in zip((rise, fall), can, strict=True)]
    worth = np.concatenate([moves.net(space.prices)[use, 0] for moves, use in rows])
    use = np.concatenate([moves.cost[binding][:, use, 0].T for moves, use in rows])
    scale = 1 / space.dense[binding]
    costly = use @ scale > 0.0  # channels of a branch that is off cost nothing, and say nothing of the price
    worth, use = worth[costly], use[costly]
    if not costly.any():
        return out
    weight = use @ scale
    solution = nnls(use * scale / weight[:, None], np.maximum(worth, 0) / weight)
    out[binding] = solution * scale
    return out
