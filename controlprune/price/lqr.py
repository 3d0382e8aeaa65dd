"""LQR of a price: the gains that weigh tracking error against price movement best, for an identified plant.

Plant (price/design.py, u = log λ, y = use), in increments, so that integral action is built in and a
constant disturbance drops out; the state z holds the error, the last change of use and the price changes
that have not acted yet::

    Δy_{t+1} = a Δy_t − (1 − a) g Δu_{t−d},     e_{t+1} = e_t + Δy_{t+1} − Δr_{t+1}     (Δu_t: set from z_t)
    z_t = (e_t, Δy_t, Δu_{t−1}, …, Δu_{t−d})                                          [2 + d]
    minimise Σ_t e_t² + R Δu_t²        =>        Δu_t = −K z_t + Δr_{t+1} F,    K [2 + d] from `control.dlqr`

F is the price change that a known change of the reference asks for by itself at rest, −1/g, so a planned
ramp is followed without waiting for an error. e = y − r and Δr in fractions of dense, λ in any unit (the
loop's is about 1: policies/feedback/pricing.py). The price is projected onto [low, high] and the projected
change enters the state: no windup.

Limit cases: R → ∞ moves nothing; R → 0 with d = 0 is deadbeat (e vanishes after one update).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import control
import numpy as np

from .identify import Response

__all__ = ["LQR", "LQRState", "lqr", "matrices"]


@dataclass(frozen=True)
class LQRState:
    price: float  # λ
    use: float | None  # y_{t−1}; None before the first update
    moves: tuple[float, ...]  # Δu_{t−1} … Δu_{t−d}


@dataclass(frozen=True)
class LQR:
    """Gains and stops; make it with `lqr`."""

    gains: tuple[float, ...]  # K
    feedforward: float  # F
    initial: float = 1.0
    low: float = 1e-8
    high: float = 1e6

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.initial <= self.high < math.inf:
            raise ValueError(
                f"LQR(low={self.low!r}, initial={self.initial!r}, high={self.high!r}): "
                "need 0 < low <= initial <= high"
            )

    def init(self) -> LQRState:
        return LQRState(self.initial, None, (0.0,) * (len(self.gains) - 2))

    def update(
        self,
        state: LQRState,
        use: float,
        reference: float,
        next_reference: float,
        applied: float | None = None,
    ) -> LQRState:
        """Price for the next update; `applied`: the price in force, where this regulator did not set it."""
        if not math.isfinite(use - reference):
            return state
        change = 0.0 if state.use is None else use - state.use
        z = (use - reference, change, *state.moves)
        move = -sum(k * x for k, x in zip(self.gains, z, strict=True))
        move += self.feedforward * (next_reference - reference)
        target = math.log(state.price) + move if applied is None else math.log(max(applied, self.low))
        price = min(max(math.exp(min(max(target, -700.0), 700.0)), self.low), self.high)
        moved = math.log(price / state.price)
        return LQRState(price, use, (moved, *state.moves)[: len(state.moves)])


def matrices(response: Response) -> tuple[np.ndarray, np.ndarray]:
    """(A, B) of z_{t+1} = A z_t + B Δu_t."""
    a, effect, d = response.pole, -(1 - response.pole) * response.gain, response.delay
    n = 2 + d
    transition, entry = np.zeros((n, n)), np.zeros((n, 1))
    transition[0, :2] = 1.0, a
    transition[1, 1] = a
    if d == 0:
        entry[:2, 0] = effect
        return transition, entry
    transition[:2, n - 1] = effect  # the oldest price change acts now
    entry[2, 0] = 1.0
    for i in range(3, n):
        transition[i, i - 1] = 1.0
    return transition, entry


def lqr(response: Response, effort: float = 0.01, initial: float = 1.0) -> LQR:
    """The optimal regulator for `response`; `effort` is R: squared error that a squared Δlog λ is worth."""
    if not (math.isfinite(effort) and effort > 0):
        raise ValueError(f"effort={effort!r}: give a finite number > 0")
    transition, entry = matrices(response)
    weights = np.zeros_like(transition)
    weights[0, 0] = 1.0
    gains, _, _ = control.dlqr(transition, entry, weights, np.array([[effort]]))
    return LQR(tuple(float(k) for k in np.asarray(gains)[0]), -1 / response.gain, initial)
