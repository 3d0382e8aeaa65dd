"""The response of a resource to its price, identified while the loop runs.

Recursive least squares with forgetting, for any linear model y = φᵀθ + noise::

    k = P φ / (μ + φᵀ P φ),    θ ← θ + k (y − φᵀθ),    P ← (P − k φᵀ P) / μ         θ: [n], P: [n, n]

μ in (0, 1] forgets with a memory of 1/(1 − μ) samples; at μ = 1 the estimate is least squares with the
prior θ_0, P_0 (ridge). In directions that are not excited P would grow without bound: its eigenvalues
are held at the prior's. The model of the price loop (regulators/design.py), u_{t+1} = log of the price
in force when y_{t+1} is measured::

    y_{t+1} = a y_t + b u_{t+1} + c,      gain g = −b / (1 − a),  pole a
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Identifier", "LeastSquares", "LeastSquaresState", "PriceState", "Response"]

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
class LeastSquaresState:
    theta: Array  # [n]
    covariance: Array  # [n, n]


@dataclass(frozen=True)
class LeastSquares:
    """Recursive least squares; `spread` is the prior standard deviation of θ over that of the noise."""

    prior: tuple[float, ...]
    spread: float = 100.0
    forgetting: float = 0.98  # μ

    def __post_init__(self) -> None:
        if not 0 < self.forgetting <= 1:
            raise ValueError(f"forgetting={self.forgetting!r}: give a number in (0, 1]")
        if not self.spread > 0:
            raise ValueError(f"spread={self.spread!r}: give a number > 0")

    def init(self) -> LeastSquaresState:
        return LeastSquaresState(np.array(self.prior), self.spread**2 * np.eye(len(self.prior)))

    def update(self, state: LeastSquaresState, features: ArrayLike, target: float) -> LeastSquaresState:
        phi = np.asarray(features, float)
        if not (np.isfinite(phi).all() and math.isfinite(target)):
            return state
        carried = state.covariance @ phi
        gain = carried / (self.forgetting + phi @ carried)
        theta = state.theta + gain * (target - phi @ state.theta)
        covariance = (state.covariance - np.outer(gain, carried)) / self.forgetting
        spread, axes = np.linalg.eigh((covariance + covariance.T) / 2)
        return LeastSquaresState(theta, (axes * np.clip(spread, 0.0, self.spread**2)) @ axes.T)


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
