"""What the controller reads time and joules with: frozen, so that a test or a lab may bring its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from .energy_meter import Meter

__all__ = ["Instruments"]


@dataclass(frozen=True)
class Instruments:
    """`clock`: seconds, any origin. `energy`: a meter; None finds one where energy is under budget.

    `cuda_graph`: the model will be deployed as a CUDA graph, so latency and energy are those of its replay;
    its forward must be one that can be captured (static shapes, nothing read off the device).
    """

    clock: Callable[[], float] = time.perf_counter
    energy: Meter | None = None
    cuda_graph: bool = False
