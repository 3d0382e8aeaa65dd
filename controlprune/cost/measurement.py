"""What was found of a resource: by a sensor (one forward pass) or by an account (the run so far)."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Measurement"]


@dataclass(frozen=True)
class Measurement:
    """`use` of a `resource` by a forward or a step, fraction of dense, and its relative error `spread`.

    `widths`: of the tensors when it was taken. `use` is nan where nothing is known at these widths. Of a run
    total besides: what is `spent`, and the `limit` on it, as fractions of a dense run.
    """

    resource: str
    widths: tuple[int, ...]
    use: float
    spread: float
    spent: float = 0.0
    limit: float = math.inf
