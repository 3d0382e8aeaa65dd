"""Regulators with something in their way, for experiments on a loop: dither, disturbance, delay.

A `Probed` regulator is a νPI (regulators/pi.py) between two taps::

    e'_t = e_{t − delay} + disturbance_t           what the νPI is given
    u'_t = u_t + dither_t                          log of the price that is put in force

so a disturbance is one of the measurement (the loop answers with its sensitivity), a dither excites the plant
without opening the loop (the direct method of identification: u' and y are both known). Sequences begin with
the first error and are repeated. `Held` opens the loop: the price is the feed-forward, times a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from controlprune.price.pi import PI, PIState

__all__ = ["Held", "Probed", "ProbedState", "binary", "multisine", "probed"]


@dataclass(frozen=True)
class ProbedState(PIState):
    inner: PIState  # of the νPI without dither
    count: int  # errors so far
    late: tuple[float, ...]  # errors that have not arrived yet


@dataclass(frozen=True)
class Probed(PI):
    """Settings; `tape` is given (error, log of the price then in force) at every update."""

    dither: tuple[float, ...] = (0.0,)
    disturbance: tuple[float, ...] = (0.0,)
    delay: int = 0
    tape: list[tuple[float, float]] = field(default_factory=list, compare=False, repr=False)

    def init(self) -> ProbedState:
        inner = super().init()
        return ProbedState(inner.price, None, inner, 0, ())

    def update(self, state: PIState, error: float, applied: float | None = None) -> ProbedState:
        assert isinstance(state, ProbedState)
        self.tape.append((error, math.log(state.price)))
        waiting = (*state.late, error)
        arrives = waiting[0] + self.disturbance[state.count % len(self.disturbance)]
        inner = super().update(state.inner, arrives, applied)
        count = state.count + 1
        price = inner.price * math.exp(self.dither[count % len(self.dither)])
        return ProbedState(price, inner.smoothed, inner, count, waiting[max(0, len(waiting) - self.delay) :])


@dataclass(frozen=True)
class Held(Probed):
    """No feedback: u'_t = dither_t, whatever comes in."""

    def update(self, state: PIState, error: float, applied: float | None = None) -> ProbedState:
        assert isinstance(state, ProbedState)
        self.tape.append((error, math.log(state.price)))
        count = state.count + 1
        price = math.exp(self.dither[count % len(self.dither)])
        return ProbedState(price, None, state.inner, count, ())


def probed(
    regulator: PI,
    dither: Sequence[float] = (0.0,),
    disturbance: Sequence[float] = (0.0,),
    delay: int = 0,
) -> Probed:
    """The same regulator with these in its way."""
    settings = {f.name: getattr(regulator, f.name) for f in fields(PI)}
    return Probed(**settings, dither=tuple(dither), disturbance=tuple(disturbance), delay=delay)


def binary(length: int, hold: int, amplitude: float, seed: int) -> tuple[float, ...]:
    """±amplitude at random, each value kept for `hold` updates."""
    draw = np.random.default_rng(seed)
    signs = np.repeat(draw.choice([-1.0, 1.0], size=-(-length // hold)), hold)[:length]
    return tuple(float(x) for x in amplitude * signs)


def multisine(period: int, harmonics: Sequence[int], amplitude: float) -> tuple[float, ...]:
    """Σ_k amplitude · cos(2π h_k t / period + φ_k), Schroeder's phases φ_k = −π k (k − 1) / n: a low peak."""
    t = np.arange(period)
    n = len(harmonics)
    wave = np.zeros(period)
    for k, h in enumerate(harmonics, start=1):
        wave += amplitude * np.cos(2 * np.pi * h * t / period - np.pi * k * (k - 1) / n)
    return tuple(float(x) for x in wave)
