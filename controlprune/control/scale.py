"""Measured over modelled: the integral action on what is known only by measuring it.

A modelled use m(n) of latency, energy or step time is wrong by a factor s that drifts with the machine and
with the widths. It is estimated while the loop runs, by a scalar Kalman filter in z = log s::

    z_{t+1} = z_t + w_t,           w ~ (0, Q)                 Q = drift²     per measurement
    log y_t = log m(n_t) + z_t + v_t,   v ~ (0, R)            R = spread²    of the measurement

    P ← P + Q,    K = P / (P + R),    z ← z + K (log y − log m − z),    P ← (1 − K) P

A limit r on the real use is then the limit r / s on the modelled one, which the solver meets exactly: at rest
y = r whatever the constant error of the model was. y and m belong to the same widths, so a measurement that
comes late corrects late but does not make the loop oscillate: the loop through z is closed only by how much
s itself depends on the widths (its slope σ = ∂log s/∂log m, small), L(z) = K σ z^{−d} / (z − 1). z itself is
corrected by 1 − K per measurement; drift = spread keeps K at 0.62, which bears being doubled.

Limit cases: spread → 0 is deadbeat (s = y/m at once); drift = 0 averages all measurements.
y and m in the same unit; drift and spread are relative (0.05: five per cent).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Observer", "ObserverState"]


@dataclass(frozen=True)
class ObserverState:
    log_scale: float  # z
    variance: float  # P

    @property
    def scale(self) -> float:
        """s: measured over modelled."""
        return math.exp(self.log_scale)


@dataclass(frozen=True)
class Observer:
    """How wrong the model of a measured resource is believed to be, and how fast that changes.

    `doubt`: relative error of the model before anything is measured. `drift`: by which measured over modelled
    moves between two measurements. `spread`: least relative error that a measurement is believed to have.
    """

    doubt: float = 0.3
    drift: float = 0.05
    spread: float = 0.05

    def __post_init__(self) -> None:
        for name, least in (("doubt", 0.0), ("drift", 0.0), ("spread", 1e-9)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= least):
                raise ValueError(f"Observer({name}={value!r}): give a finite relative error >= {least:g}")

    def init(self) -> ObserverState:
        return ObserverState(0.0, self.doubt**2)

    def update(
        self, state: ObserverState, modelled: float, measured: float, spread: float = 0.0
    ) -> ObserverState:
        """One measurement; one that is not a positive finite number is left out."""
        if not (0 < modelled < math.inf and 0 < measured < math.inf):
            return state
        noise = max(spread if math.isfinite(spread) else 1.0, self.spread) ** 2
        variance = state.variance + self.drift**2
        gain = variance / (variance + noise)
        innovation = math.log(measured / modelled) - state.log_scale
        return ObserverState(state.log_scale + gain * innovation, (1.0 - gain) * variance)
