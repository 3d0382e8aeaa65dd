"""placeholder"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["InfeasibleBudget"]


class InfeasibleBudget(ValueError):
    """No choice of units meets the budget; `ranges` holds what each resource can reach."""

    def __init__(self, message: str, ranges: Mapping[str, tuple[float, float]]) -> None:
        super().__init__(message)
        self.ranges = dict(ranges)
