"""Recursive least squares with forgetting, for any linear model y = φᵀθ + noise::

    k = P φ / (μ + φᵀ P φ),    θ ← θ + k (y − φᵀθ),    P ← (P − k φᵀ P) / μ         θ: [n], P: [n, n]

μ in (0, 1] forgets with a memory of 1/(1 − μ) samples; at μ = 1 the estimate is least squares with the
prior θ_0, P_0 (ridge). In directions that are not excited P would grow without bound: its eigenvalues
are held at the prior's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["LeastSquares", "LeastSquaresState"]

Array = NDArray[np.float64]


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
