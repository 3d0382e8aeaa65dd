"""Caution: how far early values are believed, and how fast the allocation may move. Pure functions.

**Order** (`by_norm`): v is how far the loss rises at once if one unit goes. A cut takes many units together
and the rest of the run heals it, so v says what the n best units of a group are worth, and the norm ‖w_i‖ of
what reads a unit which ones these are: active units get the values of their group in the order of ‖w_i‖. The
norm is the first-order value with the whole run so far as its memory: under gradient flow, with the rate η,

    d/dt ½‖w_i‖² = ⟨w_i, ẇ_i⟩ = −η ∂L/∂g_i

where v knows a window of it, and a curvature that counts what other units and biases can take over. Equal
norms, and dormant units, go by v. Only under a limit, which says how many go: a price alone is answered by
every unit with its own v.

**Stability**: mean over groups of Spearman's rank correlation of Σ g² between two disjoint windows of
observations, over the active units. It is the evidence that a ranking is more than noise.

**Trusted values**: with ρ = trust × stability ∈ [0, 1] and `v_(j)` the j-th best value of a group,

    ṽ_(j) = ρ v_(j) + (1 − ρ) s π_(j),        s = mean_g v_(n̄_g) / mean_g π_(n̄_g)

where π is the prior whose best allocation is the uniform one, n̄ (allocate/uniform.py), and s brings it to the
scale of v at the margin: without trust the values decide which units of a group stay, not how many. With π
for the prices 1, s is the price at which s π makes n̄ the best allocation.

**Floors** of one update: (1 − ρ) n̄_g, and at the budget no group loses more than `slew_g` units at once.
**Holds**: the recently switched units, and all dormant ones but the best `slew_g`, keep their state.
**Slew**: an eighth of the group, at least one width step.

Values in loss, widths in units; arrays per group.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..cost.polynomial import Polynomial
from ..cost.problem import Problem

__all__ = ["Values", "believed", "by_norm", "margin_scale", "prior_values", "stability", "trusted"]

Values = tuple[NDArray[np.float64], ...]


def stability(now: Tensor, before: Tensor, group: Tensor, on: Tensor) -> float:
    """In [0, 1]; 0 where there is nothing to compare. Vectors over all units."""
    found: list[float] = []
    for g in range(int(group.max()) + 1):
        i = (group == g) & on
        if i.sum() > 3 and now[i].any() and before[i].any():
            ranks = torch.stack([x[i].argsort().argsort().float() for x in (now, before)])
            found.append(float(torch.corrcoef(ranks)[0, 1]))
    return max(0.0, float(np.mean(found))) if found else 0.0


def by_norm(values: Tensor, norms: Tensor, group: Tensor, on: Tensor) -> Tensor:
    """The values of a group's active units, the largest to that of largest norm. Vectors over all units."""
    v, place = values.numpy(), 2 * group.numpy() + on.numpy()
    w = np.where(on.numpy(), norms.numpy(), 0.0)
    out = np.empty_like(v)
    out[np.lexsort((v, w, place))] = v[np.lexsort((v, place))]
    return torch.from_numpy(out)


def margin_scale(values: Values, prior: Values, even: Sequence[int]) -> float:
    """s; `prior` is sorted, best first; `even` is n̄."""
    at = [n - 1 for n in even]
    worth = np.mean([np.sort(x)[::-1][i] for x, i in zip(values, at, strict=True)])
    return float(worth / np.mean([p[i] for p, i in zip(prior, at, strict=True)]))


def trusted(values: Values, prior: Values, scale: float, trust: float) -> Values:
    """ṽ per group, in the order of `values`; `prior` is sorted, best first; `scale` is s."""
    mixed: list[NDArray[np.float64]] = []
    for x, p in zip(values, prior, strict=True):
        out, order = np.empty_like(x), np.argsort(-x, kind="stable")
        out[order] = trust * x[order] + (1.0 - trust) * scale * p
        mixed.append(out)
    return tuple(mixed)


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


def believed(problem: Problem, values: Tensor, trust: float, even: tuple[int, ...]) -> tuple[Values, float]:
    """ṽ per group from v of all units, and s: the price at which the uniform allocation would be the best."""
    sizes = problem.structure.sizes
    split = tuple(x.numpy() for x in torch.split(values.double(), list(sizes)))
    if not even:
        return split, 0.0
    limited = [k for k in problem.costs if k not in problem.prices]
    shares = 1.0 / np.array([problem.dense[k] for k in limited])
    prior = prior_values(even, [problem.costs[k] for k in limited], sizes, shares)
    scale = margin_scale(split, prior, even)
    return trusted(split, prior, scale, trust), scale
