"""Pace: how often to observe and calibrate, and when a shrink pays. From counts, never from a clock:
the same seed must give the same run.

Times on a nominal CPU core, of which only ratios matter (a call: one small operator, Python included):

    step        3 forward · FLOPs / RATE + 20 calls per counted operator
    observe     one pass over weights and gradients of all readers: 30 calls + 6 per reader dimension
                + 16 FLOPs an element; spaced to take at most `OBSERVATION_SHARE` of a step
    calibrate   trials + 1 forward passes, a third of a step each, and `LEARNING` seconds; at most
                `CALIBRATION_SHARE` of the steps
    shrink      pays if  saved · 3 · forward · steps left  >  bytes moved / bandwidth + 1 ms,
                saved = 1 − C(n)/C(N), every number moved with its gradient and two states, read and written
    recompile   under torch.compile (C(n₀) − C(n))/C(N) of what is left must be more than COMPILE seconds and
                COMPILE_OPERATOR for each counted operator; where nothing is saved, `REVISION` of it

A short run must still learn something: before 3/4 of the horizon there are at least `OBSERVATIONS`
observations and `CALIBRATIONS` calibrations, whatever they take.
"""

from __future__ import annotations

import math

from ..base import Setting

__all__ = ["calibration_spacing", "observation_spacing", "recompile_pays", "shrink_pays"]

OBSERVATION_SHARE = 0.0025
CALIBRATION_SHARE = 0.004
OBSERVATIONS, CALIBRATIONS = 400, 6
RATE = 5e10  # FLOP per second of a step
CALL = 6e-6  # seconds
LEARNING = 0.02  # seconds that the gate network trains after a calibration
COPY_BYTES_PER_SECOND = 2e9  # cautious guesses, for a shrink
FLOPS_PER_SECOND = 2e10
COMPILE, COMPILE_OPERATOR = 5.0, 1.0  # seconds, forward and backward together, nothing cached
REVISION = 0.01


def _step_seconds(setting: Setting) -> float:
    return 3.0 * setting.flops / RATE + 20 * CALL * len(setting.structure.work)


def observation_spacing(setting: Setting) -> int:
    """Steps between observations."""
    readers = {(part.tensor, part.dim) for group in setting.structure.groups for part in group.readers}
    seconds = CALL * (30 + 6 * len(readers)) + 16.0 * setting.elements / RATE
    wanted = max(setting.total_steps / 3000, seconds / _step_seconds(setting) / OBSERVATION_SHARE)
    return max(1, min(50, math.ceil(wanted), int(0.75 * setting.total_steps / OBSERVATIONS)))


def calibration_spacing(setting: Setting, trials: int, update_every: int) -> int:
    """Updates between calibrations."""
    step = _step_seconds(setting)
    wanted = ((trials + 1) / 3.0 + LEARNING / step) / CALIBRATION_SHARE
    return max(1, round(min(wanted, 0.75 * setting.total_steps / CALIBRATIONS) / update_every))


def shrink_pays(setting: Setting, fraction: float, steps_left: int) -> bool:
    """Is the time saved at `fraction` of the dense work more than the copying takes?"""
    saved = (1.0 - fraction) * 3.0 * setting.flops / FLOPS_PER_SECOND * steps_left
    copying = 2 * 4 * 4 * setting.elements / COPY_BYTES_PER_SECOND + 1e-3
    return saved > copying


def recompile_pays(setting: Setting, held: float, fraction: float, steps_left: int) -> bool:
    """Is a compilation less than the time saved by going from `held` to `fraction` of the dense work?"""
    left = 3.0 * setting.flops / FLOPS_PER_SECOND * steps_left
    compiling = COMPILE + COMPILE_OPERATOR * len(setting.structure.work)
    return max(held - fraction, REVISION) * left > compiling
