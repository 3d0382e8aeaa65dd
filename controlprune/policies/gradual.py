"""Gradual pruning: along a cubic to the budget (Zhu & Gupta 2017, arXiv 1710.01878).

    s(t) = s_f (1 − (1 − (t − t₀)/(t₁ − t₀))³),   t₀ <= t <= t₁      s: what is cut, of dense

in terms of the level, ℓ(t) = (1 − (t − t₀)/(t₁ − t₀))³: many units go early, while there are many, and few at
the end. At every update the units with the largest scores stay,

    by = "norm"        ‖w_i‖² = Σ w² over the columns that read the unit                (the paper's)
    by = "movement"    −Σ_t g_i ∂L/∂g_i at g = 1: how far training has moved its columns away from zero
                       (Sanh et al. 2020, arXiv 2005.07683, for pretrained models)

and units that were cut keep their weights, and their score.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..control.ramp import Plan, PlanState, Trend
from .scheduled import Rule, Units, require_share, require_steps, top

__all__ = ["Cubic", "Gradual"]


@dataclass(frozen=True)
class Cubic(Plan):
    """ℓ = (1 − x)³ with x from 0 at `latest` to 1 at `deadline`."""

    def update(self, state: PlanState, progress: float, trend: Trend, stability: float) -> PlanState:
        started = self.latest if progress >= self.latest else None
        return PlanState(min(state.level, self._at(progress)), progress, started, math.inf)

    def ahead(self, progress: float, level: float, started: float | None) -> float:
        """Mean of ℓ over the rest: 1 until it starts, then ∫ (1 − x)³ = (1 − x₀)⁴/4 of its length."""
        if progress >= 1.0:
            return level
        length, waits = self.deadline - self.latest, max(self.latest - progress, 0.0)
        return (waits + length * self._at(max(progress, self.latest)) ** (4 / 3) / 4) / (1.0 - progress)

    def _at(self, progress: float) -> float:
        if progress >= self.deadline:
            return 0.0
        if progress <= self.latest:
            return 1.0
        return ((self.deadline - progress) / (self.deadline - self.latest)) ** 3


@dataclass(frozen=True, kw_only=True)
class Gradual(Rule):
    """`start`, `end`: shares of the run between which units go.

    `by`: what ranks them, the "norm" of their readers or its growth, "movement". `update_every`: steps.
    `shrink=False`: masks only. `layers`: "uniform" or "erk" densities, of single weights.
    """

    start: float = 0.1
    end: float = 0.6
    by: Literal["norm", "movement"] = "norm"
    update_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            require_share(name, getattr(self, name))
        if not self.start <= self.end:
            raise ValueError(f"start={self.start!r}, end={self.end!r}: it must end after it starts")
        if self.by not in ("norm", "movement"):
            raise ValueError(f'by={self.by!r}: give "norm" or "movement"')
        if self.update_every is not None:
            require_steps("update_every", self.update_every)

    @property
    def every(self) -> int | None:
        return self.update_every

    def plan(self, total_steps: int) -> Plan:
        return Cubic(
            earliest=self.start, latest=self.start, deadline=self.end, duration=self.end - self.start
        )

    def listens(self, step: int) -> bool:
        return self.by == "movement"

    def choose(self, units: Units, width: int) -> Tensor:
        return top(-units.gradient if self.by == "movement" else units.norm, width)
