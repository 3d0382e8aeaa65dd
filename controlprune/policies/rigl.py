"""RigL: drop the smallest, grow where the gradient is largest (Evci et al. 2020, arXiv 1911.11134).

It starts at the budget with n_g random units of every group. Every ΔT = `update_every` steps until `until` of
the run (T_end = until · T)

    k      = ⌊f(t) n_g⌋,   f(t) = α/2 (1 + cos(π t / T_end))
    drop     the k units that are on with the smallest ‖w_i‖     (norm of the columns that read the unit)
    grow     the k with the largest |Σ ∂L/∂g_i| among all that are off then, over the last `look` steps

so every group keeps its width. Dormant units are in the tensors, masked, for these `look` steps only; in the
paper they are all the time, at the cost of the dense gradient. Also unlike there, where a grown weight starts
at zero: a unit's consumers at zero would hide its own gradient, so it returns with the weights and the
optimizer state that it left with (its initial ones, if it never was on).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..control.ramp import Plan
from ..cost.problem import Problem
from ..plant.base import Kind
from .scheduled import Rule, Units, at_once, require_share, require_steps, top
from .set import regrow

__all__ = ["RigL", "cosine"]


def cosine(drop: float, progress: float, until: float) -> float:
    """f(t)"""
    return drop / 2 * (1 + math.cos(math.pi * min(1.0, progress / until)))


@dataclass(frozen=True, kw_only=True)
class RigL(Rule):
    """`drop`: α. `until`: T_end as a share of the run. `look`: steps that gradients are summed over.

    `update_every`: ΔT in steps; None lets the horizon decide. `shrink=False`: masks only. `layers`:
    "uniform" or "erk" densities, of single weights.
    """

    drop: float = 0.3
    until: float = 0.75
    look: int = 1
    update_every: int | None = None

    def __post_init__(self) -> None:
        require_share("drop", self.drop)
        require_share("until", self.until)
        require_steps("look", self.look)
        if self.update_every is not None:
            require_steps("update_every", self.update_every)
            if self.update_every <= self.look:
                raise ValueError(f"update_every={self.update_every}: give more steps than look={self.look}")

    @property
    def every(self) -> int | None:
        return self.update_every

    @property
    def kind(self) -> Kind:
        return "entry"

    @property
    def exchanges(self) -> float:
        return self.until

    @property
    def looks(self) -> int:
        return self.look

    def require(self, problem: Problem) -> None:
        super().require(problem)
        if "memory" in problem.budget:
            raise ValueError(
                "budget: memory bounds every step, and cp.RigL puts dormant units into the tensors to see "
                "their gradients; give policy=cp.SET(), or another resource"
            )

    def plan(self, total_steps: int) -> Plan:
        return at_once(0.0)

    def choose(self, units: Units, width: int) -> Tensor:
        if units.on.all():
            return top(units.draw(), width)
        seen = units.exchange and bool(units.gradient.any())  # the step of the look may have been skipped
        drop = int(cosine(self.drop, units.progress, self.until) * width) if seen else 0
        return regrow(units.norm, units.on, units.gradient.abs(), width, drop)
