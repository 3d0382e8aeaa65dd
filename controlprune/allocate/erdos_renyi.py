"""Erdős–Rényi kernel: thin layers stay denser (Mocanu et al. 2018; with kernels, Evci et al. 2020).

    density_l = min(1, ε Σ_d shape_d / Π_d shape_d)       shape: of the weights, (out, in) or (out, in, k, k)
    ε         the largest with C_k(n) ≤ r_k for every resource,    n_l = ⌊density_l N_l⌋

Where only weights are counted (`params`) and none is capped, ε = budget / Σ_l Σ_d shape_{l,d}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ..cost.problem import Problem, require_feasible
from ..structure.extents import size

__all__ = ["erk_under"]

HALVINGS = 60


def erk_under(problem: Problem, limits: Mapping[str, float]) -> tuple[int, ...]:
    """Live weights of every group; empty where nothing is to be met. `limits`: fractions of dense."""
    if not limits:
        return ()
    structure = problem.structure
    sizes = np.array(structure.sizes)
    costs = [problem.costs[k] for k in limits]
    bounds = [r * problem.dense[k] for k, r in limits.items()]
    require_feasible(costs, bounds, [1] * len(sizes), structure.sizes, list(limits))
    shapes = [[size(extent) for extent in structure.tensors[name]] for name in structure.names]
    thin = np.array([sum(shape) / math.prod(shape) for shape in shapes])

    def widths(scale: float) -> np.ndarray:
        return np.maximum(1, np.floor(np.minimum(1.0, scale * thin) * sizes + 1e-9)).astype(int)

    def meets(scale: float) -> bool:
        return all(cost.value(widths(scale)) <= bound for cost, bound in zip(costs, bounds, strict=True))

    low, high = 0.0, 1.0 / float(thin.min())
    if meets(high):
        return structure.sizes
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if meets(middle) else (low, middle)
    return tuple(int(n) for n in widths(low))
