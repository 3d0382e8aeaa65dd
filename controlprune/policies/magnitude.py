"""Magnitude pruning: train dense, cut once, fine-tune (Han et al. 2015, arXiv 1506.02626).

At t = `at`·T the n_g units of every group with the largest norm stay; the masks hold from then on:

    m_i = 1  iff  ‖w_i‖ is among the n_g largest,      ‖w_i‖² = Σ w² over the columns that read unit i

n: the uniform allocation under the budget. Before the cut every step costs what the dense net costs, so the
run as a whole uses at + (1 − at)·C(n)/C(N); a budget of a run total moves the cut forward if it must.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..control.ramp import Plan
from .scheduled import Rule, Units, at_once, require_share, top

__all__ = ["Magnitude"]


@dataclass(frozen=True, kw_only=True)
class Magnitude(Rule):
    """`at`: the share of the run after which units are cut. `shrink=False`: masks only. `layers`: "uniform"
    or "erk" densities, of single weights."""

    at: float = 0.5

    def __post_init__(self) -> None:
        require_share("at", self.at)

    def plan(self, total_steps: int) -> Plan:
        return at_once(self.at)

    def choose(self, units: Units, width: int) -> Tensor:
        return top(units.norm, width)
