"""Pace: how often to observe and calibrate, and when a shrink pays. From counts, never from a clock:
the same seed must give the same run.

    observe     one observation reads weights and gradients of all readers, about 16 FLOPs' time an element;
                spaced so that it takes at most `OBSERVATION_SHARE` of a step (≈ 3 forward passes)
    calibrate   trials + 1 forward passes, a third of a step each; at most `CALIBRATION_SHARE` of the steps
    shrink      pays if  saved · 3 · forward · steps left  >  bytes moved / bandwidth + 1 ms,
                saved = 1 − C(n)/C(N), forward = FLOPs / FLOPS_PER_SECOND, every number moved with its
                gradient and two states, read and written
"""

from __future__ import annotations

import math

from .base import Setting

__all__ = ["calibration_spacing", "observation_spacing", "shrink_pays"]

OBSERVATION_SHARE = 0.01
CALIBRATION_SHARE = 0.015
COPY_BYTES_PER_SECOND = 2e9  # cautious guesses for a CPU core
FLOPS_PER_SECOND = 2e10


def observation_spacing(setting: Setting) -> int:
    """Steps between observations."""
    share = 16.0 * setting.elements / max(3.0 * setting.flops, 1.0)
    return int(min(50, max(1, setting.total_steps // 3000, math.ceil(share / OBSERVATION_SHARE))))


def calibration_spacing(trials: int, update_every: int) -> int:
    """Updates between calibrations."""
    return max(1, round((trials + 1) / 3.0 / CALIBRATION_SHARE / update_every))


def shrink_pays(setting: Setting, fraction: float, steps_left: int) -> bool:
    """Is the time saved at `fraction` of the dense work more than the copying takes?"""
    saved = (1.0 - fraction) * 3.0 * setting.flops / FLOPS_PER_SECOND * steps_left
    copying = 2 * 4 * 4 * setting.elements / COPY_BYTES_PER_SECOND + 1e-3
    return saved > copying
