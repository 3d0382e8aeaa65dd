"""Non-negative least squares: x = argmin ‖A x − b‖ over x ≥ 0, by Lawson and Hanson's active sets.

    w = Aᵀ(b − A x)              while some x_j = 0 with w_j > 0: free the largest,
    s = argmin over the free     and where s has entries ≤ 0, go only as far as x stays ≥ 0 and fix those at 0

At the end x ≥ 0, w ≤ 0 and x ∘ w = 0 (up to rounding). For the few unknowns here numpy's `lstsq` is as fast
as scipy's solver, whose import takes half a second in the first update of a run.

C. L. Lawson, R. J. Hanson: Solving Least Squares Problems (1974), chapter 23.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["nnls"]

Array = NDArray[np.float64]
ROUNDS = 10  # times the number of unknowns: rounding may free and fix one for ever


def nnls(a: Array, b: Array) -> Array:
    """x of shape (n,) for A of (m, n) and b of (m,)."""
    n = a.shape[1]
    x, free = np.zeros(n), np.zeros(n, bool)
    least = 10 * np.finfo(float).eps * max(a.shape) * float(np.linalg.norm(a, axis=0).max(initial=0.0))
    least *= float(np.linalg.norm(b))
    for _ in range(ROUNDS * n):
        slope = np.where(free, -np.inf, a.T @ (b - a @ x))
        j = int(slope.argmax())
        if free.all() or slope[j] <= least:
            break
        free[j] = True
        x, free = _settled(a, b, x, free)
    return x


def _settled(a: Array, b: Array, x: Array, free: NDArray[np.bool_]) -> tuple[Array, NDArray[np.bool_]]:
    """The least squares over the free, with as many of them fixed at 0 as it takes to be ≥ 0."""
    while free.any():
        s = np.zeros_like(x)
        s[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
        below = free & (s <= 0)
        if not below.any():
            return s, free
        step = float(np.min(x[below] / (x[below] - s[below] + np.finfo(float).tiny)))
        x = x + step * (s - x)
        free = free & ~(below & (x <= 1e-15 * max(1.0, float(np.abs(x).max()))))
        x[~free] = 0.0
    return x, free
