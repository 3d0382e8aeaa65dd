"""What the loop knows of every unit: its gate's gradient over time, what reads it, how long it is as it is.

    observe        g ∈ R^G at a step     -> moments (saliency/moments.py), Σ g² of the running window
    statistics     at an update          -> mean, Fisher curvature, norms, marginal costs, ages  (network.py)
    plasticity     of the net: how far what reads the active units is from where it began      (worth.py)
    stability      of the ranking of Σ g² between two windows, for a plan that heeds it         (worth.py)

Vectors over all units, one group after the other. Gradients are taken in units of their size when the first
ones came (a power of two), so that a run whose loss is k times as large decides alike. The window's rounding
(bfloat16) is far under its sampling error, that of norms at the start averages out over a group; ages are in
updates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...cost.problem import Problem
from ...saliency.moments import Moments, fisher, observe, start_moments
from ...saliency.network import Statistics
from ...saliency.worth import plasticity, stability
from ...structure.groups import widths_of

__all__ = ["UnitRecord", "checked_values"]

GREW = 2.0**16  # its square, and that times a batch, are far from what float32 and bfloat16 hold
OLD = 30_000  # updates: the age of a unit that was never switched, and where ages stop


class UnitRecord:
    """`moves`: sum movement up. `ranks`: keep windows, for the stability of ranks.

    How far the moments reach back is said by `set_pace`.
    """

    def __init__(self, problem: Problem, *, moves: bool = False, ranks: bool = False) -> None:
        self.sizes = list(problem.structure.sizes)
        units = sum(self.sizes)
        self.group = torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes))
        self.batch = max(1, problem.batch)  # of a mini-batch: the scale between variance and Fisher
        self.moments = start_moments(units)
        self.movement = torch.zeros(units if moves else 0)  # −Σ g over all observations
        self.scale = 0.0  # what gradients are divided by; 0: none was seen yet
        self.window = torch.zeros(2, units if ranks else 0, dtype=torch.bfloat16)  # Σ g²: running, last
        self.first = torch.full((units,), math.inf, dtype=torch.bfloat16)  # `began`; inf: not known
        self.age = torch.full((units,), OLD, dtype=torch.int16)  # updates since the last change

    def set_pace(self, memory: float, update_every: int) -> None:
        """`memory`: observations that the moments reach back; `update_every`: steps."""
        self.decay, self.update_every = 1.0 - 1.0 / memory, update_every

    def observe(self, gradients: Tensor) -> None:
        """What is not finite was not seen."""
        self._grow_to(_scale(gradients))
        gradients = (gradients.double() / (self.scale or 1.0)).float()
        self.moments = observe(self.moments, gradients, self.decay)
        if self.movement.numel() or self.window.numel():
            seen = torch.nan_to_num(gradients, nan=0.0, posinf=0.0, neginf=0.0)
            if self.window.numel():
                self.window[0] += seen.square()
            if self.movement.numel():
                self.movement -= seen

    def _grow_to(self, scale: float) -> None:
        """What was seen before, in the units of gradients that are `GREW` times larger."""
        if self.scale == 0.0:
            self.scale = scale
        elif scale > GREW * self.scale:
            ratio = self.scale / scale
            first, second, count = vars(self.moments).values()
            self.moments = Moments(first * ratio, second * ratio**2, count)
            self.window, self.movement = self.window * ratio**2, self.movement * ratio
            self.scale = scale

    def forget(self, units: Tensor) -> None:
        """These units are about to be looked at: what was seen of them is old."""
        self.moments = Moments(*(x.masked_fill(units, 0) for x in vars(self.moments).values()))

    def statistics(self, problem: Problem, step: int, on: Tensor, norms: Tensor, slope: float) -> Statistics:
        """`slope`: of the loss; `on`: the units that are; `norms`: of what reads them."""
        mean, curvature = fisher(self.moments, self.decay, self.batch)
        if problem.prices:  # they are in loss
            mean, curvature = mean * self.scale, curvature * self.scale**2
        horizon = max(1, problem.total_steps)
        age = (self.age.float() * self.update_every / horizon).clamp_max(1.0)
        return Statistics(
            mean, curvature, norms, self.movement, self.moments.count.float(),
            self._marginal_costs(problem, on), age, on, self.group, slope, min(1.0, step / horizon),
        )  # fmt: skip

    def began(self, norms: Tensor) -> None:
        """Norms of what reads the units before the first step."""
        self.first = norms.bfloat16()

    def plasticity(self, norms: Tensor, on: Tensor) -> float:
        """0 where it is not known how the run began."""
        first, now = (self.split(torch.where(on, x, 0.0)) for x in (self.first.float(), norms))
        return plasticity(first, now)

    def _marginal_costs(self, problem: Problem, on: Tensor) -> Tensor:
        """Fraction of dense that one unit of each group costs at the present widths, over all resources."""
        widths = widths_of(self.split(on))
        one = np.ones(len(widths))
        total = np.zeros(len(widths))
        for name, cost in problem.costs.items():
            total += cost.marginals(widths, one) / problem.dense[name]
        return torch.from_numpy(total).float()[self.group]

    def split(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Per group."""
        return torch.split(vector, self.sizes)

    def stability(self, on: Tensor) -> float:
        """Of the values between the running window and the last, which it then becomes; 0 without windows."""
        if not self.window.numel():
            return 0.0
        now, before = self.window.float()
        self.window = torch.stack([torch.zeros_like(self.window[0]), self.window[0]])
        return stability(now, before, self.group, on)

    def grow_older(self) -> None:
        self.age = (self.age + 1).clamp_max(OLD)

    def decided(self, was: Tensor, now: Tensor) -> None:
        """The masks of an update are known."""
        self.age = self.age.masked_fill(was != now, 0)

    def state_dict(self) -> dict[str, Any]:
        return {
            "moments": vars(self.moments) | {},
            "window": self.window.clone(),
            "age": self.age.clone(),
            "first": self.first.clone(),
            "movement": self.movement.clone(),
            "scale": self.scale,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.moments = Moments(**state["moments"])
        self.scale = float(state["scale"])
        self.movement = state["movement"]
        self.window, self.age, self.first = state["window"], state["age"], state["first"]


def _scale(gradients: Tensor) -> float:
    """The power of two next to the root mean square of what is finite; 0 where that is nothing."""
    if not len(gradients):
        return 0.0
    size = float(torch.linalg.vector_norm(gradients, dtype=torch.float64)) / math.sqrt(len(gradients))
    if not math.isfinite(size):
        seen = gradients[gradients.isfinite()].double()
        size = float(seen.square().mean().sqrt()) if len(seen) else 0.0
    return 2.0 ** round(math.log2(size)) if size > 0.0 else 0.0


def checked_values(values: Tensor, known: Statistics) -> Tensor:
    """What a function of the user's gave."""
    units = len(known.mean)
    if not isinstance(values, Tensor) or values.shape != (units,) or not bool(values.isfinite().all()):
        raise ValueError(f"Control(value=…) gave {values!r}: give one finite number for each of {units}")
    return values.detach().float()
