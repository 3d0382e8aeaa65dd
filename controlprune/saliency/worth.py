"""From the value of single units to the worth of many: what units are worth as others of their group go.

v_i is how far the loss rises if unit i alone goes. Where the net learned elsewhere what its units hold, that
is lost with them, and their values add up. What it learned in this run the units that stay can learn again:
they replace each other, and what is left of a group has to do the work of all. How much that is of the net
is its **plasticity**,

    p = mean_g [1 − ‖w_g(0)‖² / ‖w_g(t)‖²]₊        w_g: what reads the active units of group g

how far it is from where the run began: 0 for a pretrained net, towards 1 from random weights. With V the
sum of v over the group, V_S over the units S that stay, and C_g the group's part of the cost,

    R(S) = V − V_S (p = 0)  …  V (V / V_S − 1) (p = 1)                        the rise of the loss
    ṽ_i  = v_i (V / V_(i))^2p (C_g Σ V / V_g Σ C)^p                           −∂R/∂V_S v_i at both ends

V_(i): the sum over the units of value v_i and more. So ṽ falls in the order of v and Σ ṽ is concave in the
width: what the trade-off needs. Groups weigh by what they do (p = 0) or by what they cost (p = 1), where the
best allocation of units that are alike is the uniform one.

**Stability**: mean over groups of Spearman's rank correlation of Σ g² between two disjoint windows of
observations, over the active units. It is the evidence that a ranking is more than noise.

**Margin price**: s = mean_g ṽ_(n̄_g) / mean_g c_g(n̄), the price of all resources at which a unit more or less
of the uniform allocation n̄ (allocate/uniform.py) would be worth about its cost.

Values in loss, widths in units, prices in loss per dense use; arrays per group.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..cost.problem import Problem
from .ranks import ranks_within

__all__ = ["Values", "depleted", "margin_price", "plasticity", "stability", "weighed"]

Values = tuple[NDArray[np.float64], ...]
TINY = 1e-30  # of a square of gradients


def stability(now: Tensor, before: Tensor, group: Tensor, on: Tensor) -> float:
    """In [0, 1]; 0 where there is nothing to compare. Vectors over all units.

    Of n ranks 0 … n − 1 each,  ρ = (Σ r r' − n (n − 1)²/4) / (n (n² − 1)/12).
    """
    g = group[on].numpy()
    x, y = (v[on].float().numpy() for v in (now, before))
    n = np.bincount(g, minlength=1).astype(float)
    seen = (n > 3) & (np.bincount(g, x != 0, len(n)) > 0) & (np.bincount(g, y != 0, len(n)) > 0)
    if not seen.any():
        return 0.0
    live = n.astype(int).tolist()
    ranks = [torch.cat(ranks_within(torch.from_numpy(v), live)).numpy() for v in (x, y)]
    together = np.bincount(g, ranks[0] * ranks[1], len(n))[seen]
    n = n[seen]
    return max(0.0, float(np.mean((together - n * (n - 1) ** 2 / 4) / (n * (n**2 - 1) / 12))))


def depleted(values: NDArray[np.float64], plastic: float = 1.0) -> NDArray[np.float64]:
    """v_i (V / V_(i))^2p of one group's units, in their order; a value below zero is noise about zero."""
    values = np.maximum(values, TINY)
    order = np.argsort(-values, kind="stable")
    kept = np.cumsum(values[order])
    worth = np.empty_like(values)
    worth[order] = values[order] * (kept[-1] / kept) ** (2.0 * plastic)
    return worth


def plasticity(first: Sequence[Tensor], now: Sequence[Tensor]) -> float:
    """p, from the squared norms of what reads the active units, per group."""
    written = [1.0 - float(a.sum() / b.sum().clamp_min(TINY)) for a, b in zip(first, now, strict=True)]
    return float(np.mean(np.clip(written, 0.0, 1.0))) if written else 0.0


def weighed(values: Values, costs: Sequence[float], plastic: float) -> Values:
    """ṽ of the units of all groups, in their order; `costs`: C_g, in any unit."""
    total = np.array([np.maximum(v, TINY).sum() for v in values])
    cost = np.maximum(costs, TINY)
    weight = (cost / cost.sum() * total.sum() / total) ** plastic
    return tuple(depleted(v, plastic) * w for v, w in zip(values, weight, strict=True))


def margin_price(problem: Problem, worth: Values, even: Sequence[int]) -> float:
    """s; `even` is n̄, 0 where there is none."""
    if not even:
        return 0.0
    at, one = np.asarray(even, float), np.ones(len(even))
    cost = np.zeros(len(even))
    for name in (k for k in problem.costs if k not in problem.prices):
        polynomial = problem.costs[name]
        cost += (polynomial.marginals(at, one) - polynomial.marginals(at, -one)) / 2 / problem.dense[name]
    return float(np.mean([np.sort(w)[-n] for w, n in zip(worth, even, strict=True)]) / np.mean(cost))
