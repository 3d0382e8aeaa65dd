"""Open-loop rivals: what is cut and when is fixed before the run. Units of least reader norm leave, for good.

    cubic      f(x) = f_end + (1 − f_end) (1 − x)³,   x = (t − start) / (end − start) in [0, 1]
               the common fraction f of every group, cut every few steps     (Zhu and Gupta, arXiv 1710.01878)
    one shot   f_end at one step

The cut is physical at once, so a step costs what its widths cost. Steps: of the optimizer; shares: of dense.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from baselines import top, uniform_widths
from torch import Tensor

from controlprune.app.compare import Side
from controlprune.cost.flops import flops
from controlprune.cost.grid import width_steps
from controlprune.plant.plant import Plant
from controlprune.structure.groups import Structure

__all__ = ["Cuts", "Schedule", "cubic", "one_shot", "training_share"]

Cuts = Mapping[int, tuple[int, ...]]  # after this step: these widths


class Schedule:
    """Carries the cuts out: `side.after`. `finish` leaves a plain model."""

    def __init__(self, side: Side, structure: Structure, cuts: Cuts) -> None:
        self.cuts, self.step = cuts, 0
        self.plant = Plant(side.model, side.optimizer, structure)

    def __call__(self, _: Tensor) -> None:
        self.step += 1
        widths = self.cuts.get(self.step)
        if widths is None:
            return
        scores = [
            torch.where(mask, norms.cpu(), -torch.inf)
            for mask, norms in zip(self.plant.masks, self.plant.weight_norms(), strict=True)
        ]
        self.plant.apply([top(s, n) for s, n in zip(scores, widths, strict=True)], compact=True)

    def finish(self) -> None:
        self.plant.harden()


def one_shot(structure: Structure, budget: float, at: int) -> Cuts:
    return {at: uniform_widths(structure, budget)}


def cubic(structure: Structure, budget: float, start: int, end: int, every: int) -> Cuts:
    """Ends at the uniform widths of the budget."""
    last = np.array(uniform_widths(structure, budget))
    sizes, steps = np.array(structure.sizes), np.array(width_steps(structure.sizes, None))
    cuts: dict[int, tuple[int, ...]] = {}
    before = sizes
    for t in range(start, end + 1, every):
        rest = (1 - (t - start) / max(1, end - start)) ** 3
        exact = last + (sizes - last) * rest
        widths = np.minimum(before, np.maximum(last, np.ceil(exact / steps).astype(int) * steps))
        if (widths < before).any():
            cuts[max(t, 1)] = tuple(int(n) for n in widths)
        before = widths
    cuts[max(end, 1)] = tuple(int(n) for n in last)
    return cuts


def training_share(structure: Structure, cuts: Cuts, steps: int) -> float:
    """FLOPs of the whole training, over those of a dense one."""
    cost = flops(structure)
    dense = cost.value(structure.sizes)
    total, now, last = 0.0, 1.0, 0
    for at in sorted(cuts):
        total += now * (min(at, steps) - last)
        now, last = cost.value(cuts[at]) / dense, min(at, steps)
    return (total + now * (steps - last)) / steps
