"""How many units of each group, by hand: scores and a budget -> masks.

    uniform    the same fraction of every group, in steps; within a group the units of highest score
    per cost   blocks of lowest score per FLOP saved leave, of all groups together, until the budget is met
    global     units of lowest score leave, of all groups together, whatever they cost

FLOPs are products of widths, so costs are taken anew after every block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .units import Units

__all__ = ["Shape", "chosen", "uniform_widths"]

Shape = Literal["uniform", "per cost", "global"]


def uniform_widths(units: Units, budget: float) -> list[int]:
    """The largest common fraction whose FLOPs are at most `budget` of dense."""
    limit, low, high = budget * units.flops(units.sizes), 0.0, 1.0

    def at(fraction: float) -> list[int]:
        pairs = zip(units.sizes, units.steps, strict=True)
        return [max(step, int(fraction * n / step) * step) for n, step in pairs]

    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if units.flops(at(middle)) <= limit else (low, middle)
    return at(low)


def chosen(units: Units, scores: Sequence[Tensor], budget: float, shape: Shape) -> list[Tensor]:
    """Masks of what stays; only units that are there now."""
    scores = [torch.nan_to_num(s, nan=-torch.inf) for s in scores]
    if shape == "uniform":
        widths = uniform_widths(units, budget)
        widths = [min(w, n) for w, n in zip(widths, units.widths, strict=True)]
    else:
        widths = _greedy(units, scores, budget, per_cost=shape == "per cost")
    return [_best(s, n) for s, n in zip(scores, widths, strict=True)]


def _best(score: Tensor, width: int) -> Tensor:
    mask = torch.zeros(len(score), dtype=torch.bool)
    mask[score.topk(width).indices] = True
    return mask


def _greedy(units: Units, scores: Sequence[Tensor], budget: float, *, per_cost: bool) -> list[int]:
    widths, limit = list(units.widths), budget * units.flops(units.sizes)
    ordered = [np.sort(s[m].numpy()) for s, m in zip(scores, units.masks, strict=True)]  # lowest first
    gone = [0] * len(widths)
    use = units.flops(widths)
    saved = [_saving(units, widths, g, use) for g in range(len(widths))]
    while use > limit:
        worth = [
            ordered[g][gone[g] : gone[g] + step].sum() / (saved[g] if per_cost else step)
            if widths[g] > step
            else np.inf
            for g, step in enumerate(units.steps)
        ]
        g = int(np.argmin(worth))
        if worth[g] == np.inf:
            raise ValueError(f"budget={budget}: even the narrowest network is above it")
        widths[g] -= units.steps[g]
        gone[g] += units.steps[g]
        use = units.flops(widths)
        saved = [_saving(units, widths, g, use) for g in range(len(widths))]
    return widths


def _saving(units: Units, widths: Sequence[int], g: int, use: float) -> float:
    fewer = list(widths)
    fewer[g] = max(0, fewer[g] - units.steps[g])
    return max(use - units.flops(fewer), 1e-9)
