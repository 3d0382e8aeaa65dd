"""Static masks: small from the start, and what was chosen stays.

    by = "random"   n_g units of every group at random, before the first step
    by = "snip"     those with the largest connection sensitivity |Σ_t ∂L/∂g_i|, g = 1, over the first
                    `batches` steps (Lee et al. 2019, arXiv 1810.02340, there for weights and one batch)

Every step (by "snip": after the first `batches`) costs what the small net costs. n is the uniform allocation
under the budget; the paper ranks all layers together, which at deep cuts empties some.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..control.ramp import Plan
from .scheduled import Rule, Units, at_once, require_steps, top

__all__ = ["Static"]


@dataclass(frozen=True, kw_only=True)
class Static(Rule):
    """`by`: which units stay, "random" ones or those of most |∂L/∂g| at first ("snip", over `batches` steps).
    `shrink=False`: masks only. `layers`: "uniform" or "erk" densities, of single weights.
    """

    by: Literal["random", "snip"] = "random"
    batches: int = 1

    def __post_init__(self) -> None:
        if self.by not in ("random", "snip"):
            raise ValueError(f'by={self.by!r}: give "random" or "snip"')
        require_steps("batches", self.batches)

    def plan(self, total_steps: int) -> Plan:
        return at_once(min(1.0, self.batches / total_steps) if self.by == "snip" else 0.0)

    def listens(self, step: int) -> bool:
        return self.by == "snip" and step <= self.batches

    def choose(self, units: Units, width: int) -> Tensor:
        """Those that are on first, where a correction of the widths asks again."""
        score = units.draw() if self.by == "random" else units.gradient.abs()
        return top(score / score.max().clamp_min(1e-30) + 2.0 * units.on, width)
