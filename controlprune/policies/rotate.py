"""Rotation: only a share of the units is in the tensors at any step, and every unit is trained in its turn.

n_g = `active`·N_g units of every group, no more than the budget allows, begin at random. Every `period` steps

    k = ⌈turn · n_g⌉
    leave    the k units that are on with the smallest Σ_t |∂L/∂g_i| since the last rotation
    return   the k that were away longest, of equals those with the largest Σ_t |∂L/∂g_i| when they left

so a unit is away for at most ⌈(N_g − n_g)/k⌉ rotations. What is away is parked with its optimizer state. Gate
gradients are those of units that are on: nothing is looked at, and the net is never wider than n.

At the end `final` = "dense" gives all units, "small" those that are on. Units that were never on together do
not fit each other, and sums over all of them are larger than any layer has seen; so where `until` < 1, from
that share of the run on nothing rotates any more, and all units (with "small": those that are on) train
together. The budget bounds the net while it rotates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..control.ramp import Plan
from ..cost.grid import ladder
from ..cost.problem import Problem
from .base import Decision, Observation, Wants
from .scheduled import Rule, Schedule, Units, at_once, require_share, require_steps, top

__all__ = ["Rotation"]


@dataclass(frozen=True, kw_only=True)
class Rotation(Rule):
    """`active`: n_g/N_g. `period`: steps. `turn`: the share of the live units that leave at once.

    `final`: what `finalize` gives, the whole net ("dense") or the live one ("small"). `until`: the share of
    the run in which it rotates; then all that is to be final trains together. `shrink=False`: masks only.
    `layers`: "uniform" or "erk" densities, of single weights.
    """

    active: float = 0.2
    period: int | None = None
    turn: float = 0.5
    final: Literal["dense", "small"] = "dense"
    until: float = 1.0

    def __post_init__(self) -> None:
        for name in ("active", "turn", "until"):
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
        return self.until

    def begin(self, problem: Problem) -> Turning:
        self.require(problem)
        return Turning(self, problem)

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


class Turning(Schedule):
    """A run of `Rotation`: when it has turned enough, all units are put back."""

    rule: Rotation

    def wants(self, step: int) -> Wants:
        wants = super().wants(step)
        return replace(wants, decision=wants.decision or step == self._last_turn)

    def decide(self, observation: Observation) -> Decision | None:
        whole = self.rule.ends_with(self.problem) if self.rule.until < 1.0 else None
        if whole is None or observation.final or observation.step < self._last_turn:
            return super().decide(observation)
        return None if all(bool(mask.all()) for mask in observation.masks) else whole

    @property
    def _last_turn(self) -> int:
        return math.ceil(self.rule.until * self.problem.total_steps - 1e-9)
