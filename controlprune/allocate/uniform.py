"""Allocations that need no values: what is feasible, the uniform one, and values that lead to it.

**Feasible range.** Costs rise with every width, so C_k(n) lies between C_k(floors) and C_k(sizes).

**Uniform.** The same fraction of every group: f is the largest with C_k(max(floor, f N)) ≤ r_k in real
numbers; every width is the allowed one below f·N_g or, as long as the limits hold, above it, the groups
furthest below first. It is what is known to work where nothing tells units apart.

Widths in units, costs in the resource's unit, prices in loss per that unit, values in loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..cost.grid import ladder
from ..cost.polynomial import Polynomial
from ..cost.problem import require_feasible

__all__ = ["uniform"]


def uniform(
    sizes: Sequence[int],
    costs: Sequence[Polynomial],
    limits: ArrayLike,
    floors: Sequence[int],
    steps: Sequence[int],
) -> tuple[int, ...]:
    """Widths at the same fraction of every group, as near under the limits as one rung each allows."""
    require_feasible(costs, limits, floors, sizes)
    bounds = np.asarray(limits, float)

    def meets(widths: NDArray[np.float64] | NDArray[np.int64]) -> bool:
        return all(cost.value(widths) <= r for cost, r in zip(costs, bounds, strict=True))

    even = _even(sizes, floors, meets)
    ladders = [ladder(n, floor, step) for n, floor, step in zip(sizes, floors, steps, strict=True)]
    below = [int(np.searchsorted(rungs, n, side="right")) - 1 for rungs, n in zip(ladders, even, strict=True)]
    widths = np.array([rungs[i] for rungs, i in zip(ladders, below, strict=True)])
    for g in np.argsort(widths / even, kind="stable"):
        raised = widths.copy()
        raised[g] = ladders[g][min(below[g] + 1, len(ladders[g]) - 1)]
        if widths[g] < even[g] and meets(raised):
            widths = raised
    return tuple(int(n) for n in widths)


def _even(
    sizes: Sequence[int], floors: Sequence[int], meets: Callable[[NDArray[np.float64]], bool]
) -> NDArray[np.float64]:
    """max(floor, f N) at the largest f in [0, 1] that meets the limits."""
    dense, least = np.asarray(sizes, float), np.asarray(floors, float)
    if meets(dense):
        return dense
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if meets(np.maximum(least, middle * dense)) else (low, middle)
    return np.maximum(least, low * dense)
