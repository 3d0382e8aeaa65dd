"""Pace: how often to observe and look, and when a shrink pays. From counts, never from a clock:
the same seed must give the same run.

Times on one nominal CPU core, of which only ratios matter (a call: one small operator, Python included):

    step        3 forward · FLOPs / RATE + 20 calls per counted operator
    observe     one pass over weights and gradients of all readers: 30 calls + 6 per reader dimension
                + 16 FLOPs an element; spaced to take at most `OBSERVATION_SHARE` of a step
    look        LOOK steps of a dense net in place of small ones, spaced to take at most the share of the
                work in between that `Control(looks=…)` allows
    shrink      pays if  saved · 3 · forward · steps left / RATE  >  bytes moved / BANDWIDTH + SETUP,
                saved = 1 − C(n)/C(N), every number moved with its gradient and two states, read and written
    recompile   under torch.compile (C(n₀) − C(n))/C(N) of what is left must be more than COMPILE seconds and
                COMPILE_OPERATOR for each counted operator; where nothing is saved, `REVISION` of it

A short run must still learn something: before 3/4 of the horizon there are at least `OBSERVATIONS`
observations, whatever they take.

Evidence (one core, torch 2.13, batch 64, best of a second): a training step ran at 2.6, 6.9 and 6.3e10 FLOP/s
on an MLP of 128, 512 and 1024, at 4.0e10 on a CNN 32-64-128. To shrink the MLPs to half took 1.9, 2.6 and
5.5 ms, 12 ms at 2048: 1 to 2 ms and 3e9 to 1.1e10 bytes/s. `SETUP` is less, as nets so small that it counts
save calls, too, which FLOPs do not tell.
"""

from __future__ import annotations

import math

from ...cost.problem import Problem

__all__ = ["LOOK", "look_spacing", "observation_spacing", "recompile_pays", "shrink_pays"]

OBSERVATION_SHARE = 0.0025
OBSERVATIONS = 400
LOOK = 2
RATE = 5e10  # FLOP per second of a step
CALL = 6e-6  # seconds
BANDWIDTH = 5e9  # bytes per second of a shrink
SETUP = 4e-4  # seconds of a shrink
COMPILE, COMPILE_OPERATOR = 5.0, 1.0  # seconds, forward and backward together, nothing cached
REVISION = 0.01


def _step_seconds(problem: Problem) -> float:
    return 3.0 * problem.flops / RATE + 20 * CALL * len(problem.structure.work)


def observation_spacing(problem: Problem) -> int:
    """Steps between observations."""
    readers = {(part.tensor, part.dim) for group in problem.structure.groups for part in group.readers}
    seconds = CALL * (30 + 6 * len(readers)) + 16.0 * problem.elements / RATE
    wanted = max(problem.total_steps / 3000, seconds / _step_seconds(problem) / OBSERVATION_SHARE)
    return max(1, min(50, math.ceil(wanted), int(0.75 * problem.total_steps / OBSERVATIONS)))


def look_spacing(fraction: float, share: float) -> float:
    """Steps between two looks, each of `LOOK` dense steps in place of steps of `fraction`."""
    return LOOK * (1.0 - fraction) / (share * fraction) if share > 0.0 else math.inf


def shrink_pays(problem: Problem, fraction: float, steps_left: int) -> bool:
    """Is the time saved at `fraction` of the dense work more than the copying takes?"""
    saved = (1.0 - fraction) * 3.0 * problem.flops / RATE * steps_left
    return saved > 2 * 4 * 4 * problem.elements / BANDWIDTH + SETUP


def recompile_pays(problem: Problem, held: float, fraction: float, steps_left: int) -> bool:
    """Is a compilation less than the time saved by going from `held` to `fraction` of the dense work?"""
    left = 3.0 * problem.flops / RATE * steps_left
    compiling = COMPILE + COMPILE_OPERATOR * len(problem.structure.work)
    return max(held - fraction, REVISION) * left > compiling
