"""The response of a resource to its price, identified while the loop runs.

By recursive least squares with forgetting (control/least_squares.py). The model of the price loop
(price/design.py), u_{t+1} = log of the price in force when y_{t+1} is measured::

    y_{t+1} = a y_t + b u_{t+1} + c,      gain g = −b / (1 − a),  pole a
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..control.least_squares import LeastSquares, LeastSquaresState

__all__ = ["Identifier", "PriceState", "Response"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Response:
    """First-order response with delay of the resource to the log price."""

    gain: float  # g = −∂y/∂log λ at rest, > 0
    pole: float = 0.0  # a, share of y kept per update
    delay: int = 0  # d, updates that a price acts late

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gain) and self.gain > 0):
            raise ValueError(f"Response(gain={self.gain!r}): give a gain > 0")
        if not 0 <= self.pole < 1:
            raise ValueError(f"Response(pole={self.pole!r}): give a pole in [0, 1)")
        if self.delay < 0:
            raise ValueError(f"Response(delay={self.delay!r}): give a number of updates >= 0")


@dataclass(frozen=True, eq=False)
class PriceState:
    fit: LeastSquaresState
    use: float | None  # y_t
    log_price: float | None  # u_{t+1}


@dataclass(frozen=True)
class Identifier:
    """(use, price) pairs, once per update -> the response of use to log price."""

    gain: float = 0.3  # what is believed before anything is seen
    pole: float = 0.0
    spread: float = 10.0
    forgetting: float = 0.98
    trusted: float = math.inf
    slowest: float = 0.99  # largest pole that is believed

    def _squares(self) -> LeastSquares:
        return LeastSquares((self.pole, -(1 - self.pole) * self.gain, 0.0), self.spread, self.forgetting)

    def init(self) -> PriceState:
        return PriceState(self._squares().init(), None, None)

    def update(self, state: PriceState, use: float, price: float) -> PriceState:
        """`use` under the price of the previous call; `price` is the one now put in force."""
        log_price = math.log(price) if price > 0 else None
        fit = state.fit
        if state.use is not None and state.log_price is not None:
            fit = self._squares().update(fit, (state.use, state.log_price, 1.0), use)
        return PriceState(fit, use, log_price)

    def response(self, state: PriceState) -> Response:
        """The identified response, its gain within a factor of `trusted` of the prior belief, its pole
        at most `slowest`.

        Where the fit makes no sense (wrong sign, not finite), the prior belief itself.
        """
        a, b, _ = state.fit.theta
        pole = min(max(float(a), 0.0), self.slowest)
        gain = float(-b / (1 - pole))  # of the pole that is believed: what b does at once is certain
        if not (math.isfinite(gain) and gain > 0):
            return Response(self.gain, self.pole)
        return Response(min(max(gain, self.gain / self.trusted), self.gain * self.trusted), pole)
