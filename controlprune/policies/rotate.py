"""Rotation: only a share of the units is in the tensors at any step, and every unit is trained in its turn.

n_g = `active`·N_g units of every group, no more than the budget allows, begin at random. Every `period` steps

    k = ⌈turn · n_g⌉
    leave    the k units that are on with the smallest Σ_t |∂L/∂g_i| since the last rotation
    return   the k that were away longest, of equals those with the largest Σ_t |∂L/∂g_i| when they left

so a unit is away for at most ⌈(N_g − n_g)/k⌉ rotations. What is away is parked with its optimizer state. Gate
gradients are those of units that are on: nothing is looked at, and the net is never wider than n.

At the end `final` = "dense" gives all units, "small" those that are on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..control.ramp import Plan
from ..cost.grid import ladder
from ..cost.problem import Problem
from .base import Decision
from .scheduled import Rule, Units, at_once, require_share, require_steps, top

__all__ = ["Rotation"]


@dataclass(frozen=True, kw_only=True)
class Rotation(Rule):
    """`active`: n_g/N_g. `period`: steps. `turn`: the share of the live units that leave at once.

    `final`: what `finalize` gives, the whole net ("dense") or the live one ("small"). `shrink=False`: masks
    only. `layers`: "uniform" or "erk" densities, of single weights.
    """

    active: float = 0.2
    period: int | None = None
    turn: float = 0.5
    final: Literal["dense", "small"] = "dense"

    def __post_init__(self) -> None:
        for name in ("active", "turn"):
            require_share(name, getattr(self, name), least=1e-6)
        if self.period is not None:
            require_steps("period", self.period)
        if self.final not in ("dense", "small"):
            raise ValueError(f'final={self.final!r}: give "dense" or "small"')

    @property
    def every(self) -> int | None:
        return self.period

    @property
    def exchanges(self) -> float:
        return 1.0

    def require(self, problem: Problem) -> None:
        super().require(problem)
        if problem.structure.entries:
            raise ValueError(
                "policy: cp.Rotation parks what is away, and single weights that are off are zero; give "
                'granularity="channel", or policy=cp.RigL() or cp.SET()'
            )

    def plan(self, total_steps: int) -> Plan:
        return at_once(0.0)

    def listens(self, step: int) -> bool:
        return True

    def keep(self, gradients: Tensor) -> Tensor:
        return gradients.abs()

    def widths(self, problem: Problem, allowed: tuple[int, ...]) -> tuple[int, ...]:
        def live(size: int, floor: int, step: int, most: int) -> int:
            rungs = ladder(size, floor, step)
            return int(rungs[rungs <= max(floor, min(most, round(self.active * size)))][-1])

        problem_of = zip(problem.structure.sizes, problem.floors, problem.steps, allowed, strict=True)
        return tuple(live(*group) for group in problem_of)

    def ends_with(self, problem: Problem) -> Decision | None:
        if self.final == "small":
            return None
        whole = tuple(torch.ones(n, dtype=torch.bool) for n in problem.structure.sizes)
        return Decision(whole, False, dict.fromkeys(problem.budget, 1.0))

    def choose(self, units: Units, width: int) -> Tensor:
        if units.on.all():
            return top(units.draw(), width)
        leave = math.ceil(self.turn * width) if units.exchange else 0
        stay = top(units.gradient.masked_fill(~units.on, -torch.inf), min(width - leave, int(units.on.sum())))
        size = units.gradient / units.gradient.max().clamp_min(1e-30)
        waits = (units.away + 0.9 * size + 0.09 * units.draw()).masked_fill(units.on, -1.0)
        return stay | top(waits.masked_fill(stay, -torch.inf), width - int(stay.sum()))
