"""Sparse evolutionary training: drop the smallest, grow at random (Mocanu et al. 2018, arXiv 1707.04780).

It starts at the budget with n_g random units of every group. Every `update_every` steps until `until` of the
run

    k = ⌊ζ n_g⌋
    drop   the k units that are on with the smallest ‖w_i‖       (norm of the columns that read the unit)
    grow   k of all units that are off then, at random

so every group keeps its width. For units in place of weights: one that returns has the weights and the
optimizer state that it left with (its initial ones, if it never was on), not new ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..control.ramp import Plan
from .scheduled import Rule, Units, at_once, require_share, require_steps, top

__all__ = ["SET", "regrow"]


def regrow(norm: Tensor, on: Tensor, gain: Tensor, width: int, drop: int) -> Tensor:
    """`width` units: all that are on but the `drop` smallest, and of the others those of most `gain`."""
    stay = top(norm.masked_fill(~on, -torch.inf), min(width - drop, int(on.sum())))
    return stay | top(gain.masked_fill(stay, -torch.inf), width - int(stay.sum()))


@dataclass(frozen=True, kw_only=True)
class SET(Rule):
    """`drop`: ζ. `until`: the share of the run after which masks hold. `update_every`: steps.

    `shrink=False`: masks only. `layers`: "uniform" or "erk" densities, of single weights.
    """

    drop: float = 0.3
    until: float = 1.0
    update_every: int | None = None

    def __post_init__(self) -> None:
        require_share("drop", self.drop)
        require_share("until", self.until)
        if self.update_every is not None:
            require_steps("update_every", self.update_every)

    @property
    def every(self) -> int | None:
        return self.update_every

    @property
    def exchanges(self) -> float:
        return self.until

    def plan(self, total_steps: int) -> Plan:
        return at_once(0.0)

    def choose(self, units: Units, width: int) -> Tensor:
        chance = units.draw()
        if units.on.all():
            return top(chance, width)
        drop = int(self.drop * width) if units.exchange else 0
        return regrow(units.norm, units.on, chance, width, drop)
