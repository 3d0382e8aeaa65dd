"""What the loop knows of every unit: its gate's gradient over time, what reads it, how long it is as it is.

    observe        g ∈ R^G at a step     -> moments (saliency/moments.py), Σ g² of the running window
    statistics     at an update          -> mean, Fisher curvature, norms, marginal costs, ages  (network.py)
    stability      of the ranking of Σ g² between the running window and the last one          (trust.py)

Vectors over all units, one group after the other. The window's rounding (bfloat16) is far under its sampling
error, ages are in updates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...saliency.moments import Moments, fisher, observe, start_moments
from ...saliency.network import Statistics
from ...saliency.trust import stability
from ...structure.groups import widths_of
from ..base import Setting

__all__ = ["UnitRecord"]

OLD = 30_000  # updates: the age of a unit that was never switched, and where ages stop


class UnitRecord:
    """`memory`: observations that the moments reach back; `update_every`: steps."""

    def __init__(self, setting: Setting, memory: float, update_every: int) -> None:
        self.decay, self.update_every = 1.0 - 1.0 / memory, update_every
        self.sizes = list(setting.structure.sizes)
        units = sum(self.sizes)
        self.batch = setting.batch  # examples of a mini-batch: the scale between variance and Fisher
        self.moments = start_moments(units)
        self.window = torch.zeros(2, units, dtype=torch.bfloat16)  # Σ g² of the running and of the last one
        self.norms: Tensor | None = None  # known from their arrival to the next decision
        self.age = torch.full((units,), OLD, dtype=torch.int16)  # updates since the last change

    def observe(self, gradients: Tensor, norms: Tensor) -> None:
        """What is not finite was not seen."""
        self.moments = observe(self.moments, gradients, self.decay)
        self.window[0] += torch.nan_to_num(gradients, nan=0.0, posinf=0.0, neginf=0.0) ** 2
        self.norms = norms if bool(norms.isfinite().all()) else self.norms

    def statistics(self, setting: Setting, step: int, on: Tensor, slope: float) -> Statistics:
        """`slope`: of the loss; `on`: the units that are."""
        mean, curvature = fisher(self.moments, self.decay, self.batch)
        horizon = max(1, setting.total_steps)
        age = (self.age.float() * self.update_every / horizon).clamp_max(1.0)
        norms = torch.ones(len(on)) if self.norms is None else self.norms
        return Statistics(
            mean, curvature, norms, self._marginal_costs(setting, on), age, on, self.group,
            slope, min(1.0, step / horizon),
        )  # fmt: skip

    @property
    def group(self) -> Tensor:
        """The number of each unit's group."""
        return torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes))

    def _marginal_costs(self, setting: Setting, on: Tensor) -> Tensor:
        """Fraction of dense that one unit of each group costs at the present widths, over all resources."""
        widths = widths_of(self.split(on))
        one = np.ones(len(widths))
        total = np.zeros(len(widths))
        for name, cost in setting.costs.items():
            total += cost.marginals(widths, one) / setting.dense[name]
        return torch.from_numpy(total).float()[self.group]

    def split(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Per group."""
        return torch.split(vector, self.sizes)

    def stability(self, on: Tensor) -> float:
        """Of the values, between the running window and the last; then the running one becomes the last."""
        now, before = self.window.float()
        self.window = torch.stack([torch.zeros_like(self.window[0]), self.window[0]])
        return stability(now, before, self.group, on)

    def grow_older(self) -> None:
        self.age = (self.age + 1).clamp_max(OLD)

    def let_go(self) -> None:
        """Every unit may be switched, however young."""
        self.age.fill_(OLD)

    def decided(self, was: Tensor, now: Tensor) -> None:
        """The masks of an update are known."""
        self.norms = None
        self.age = self.age.masked_fill(was != now, 0)

    def state_dict(self) -> dict[str, Any]:
        return {
            "batch": self.batch,
            "moments": vars(self.moments) | {},
            "window": self.window.clone(),
            "age": self.age.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.batch = state["batch"]
        self.moments = Moments(**{k: _like(state["moments"][k], v) for k, v in vars(self.moments).items()})
        self.window, self.age = _like(state["window"], self.window), _like(state["age"], self.age)


def _like(value: Tensor, present: Tensor) -> Tensor:
    if value.shape != present.shape or value.dtype != present.dtype:
        raise ValueError(
            f"a vector of {tuple(value.shape)} {value.dtype} where {tuple(present.shape)} belongs"
        )
    return value
