"""What was found of a resource: by a sensor (one forward pass) or by an account (the run so far)."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Measurement"]


@dataclass(frozen=True)
class Measurement:
    """`use` of one forward or one step at `widths`, as a fraction of dense, and its relative error.

    Of a run total besides: what is `spent` and what may be in all, as fractions of a dense run.
    """

    resource: str
    widths: tuple[int, ...]  # in the tensors when it was taken
    use: float  # nan: not known since the tensors have these widths
    spread: float
    spent: float = 0.0
    limit: float = math.inf
