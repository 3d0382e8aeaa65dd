"""νPI: a projected PI regulator of a price, with smoothing and without windup.

With the error e_t = y_t − r_t (resource use over reference, fractions of dense) and u = log λ::

    ξ_t     = ν ξ_{t−1} + (1 − ν) e_t                                  (ξ_{−1} = e_0: no kick at the start)
    u_{t+1} = clip[ u_t + clip[K_I e_t + K_P (ξ_t − ξ_{t−1}), ±rate],  log low, log high ]

λ is a price in any unit; the loop gives it relative to a feed-forward price, so that it is about 1
(policies/feedback/pricing.py). `log_scale=False` regulates u = λ itself (low may be 0).
The velocity form keeps no integral beside the clipped price, so nothing winds up while it is clipped, nor
while its rate is.
If another mechanism sets the price (`applied`: the shadow price of a limit that is solved exactly), the
regulator tracks it by back-calculation, u_{t+1} = log λ_applied, and takes over from there without a bump.

Limit cases: K_P = 0 (any ν) is dual ascent, λ_{t+1} = [λ_t + K_I e_t]₊ for `log_scale=False` and
exponentiated dual ascent for the log; ν = 0 is the plain PI, where nothing clips
u_t = u_0 + K_I Σ_{s<t} e_s + K_P (e_{t−1} − e_0); K_I = 0 leaves a steady-state error.

Source: Sohrabi et al., "On PI controllers for updating Lagrange multipliers", arXiv 2406.04558 (there
ξ_0 = (1 − ν) e_0, ours has no initial kick; projection and log scale as here).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["PI", "PIState"]


@dataclass(frozen=True)
class PIState:
    price: float  # λ
    smoothed: float | None  # ξ; None before the first error


@dataclass(frozen=True)
class PI:
    """A price regulator; it acts where the price steers, under `Control(invert=False)`.

    `integral`: K_I, per update. `proportional`: K_P. `smoothing`: ν, in (−1, 1). `initial`, `low`, `high`:
    the price at first, and what it is clipped to. `log_scale`: regulate log λ, else λ. `rate`: the largest
    change of what is regulated per update. The default gains are `design(Response(gain=0.3, delay=1),
    delay_margin=8)`.
    """

    integral: float = 0.551
    proportional: float = 0.0
    smoothing: float = 0.0
    initial: float = 1.0
    low: float = 1e-8
    high: float = 1e6
    log_scale: bool = True
    rate: float = math.inf

    def __post_init__(self) -> None:
        for name in ("integral", "proportional"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"PI({name}={value!r}): give a finite gain >= 0")
        if not self.rate > 0:
            raise ValueError(f"PI(rate={self.rate!r}): give the largest change per update, > 0")
        if not -1 < self.smoothing < 1:
            raise ValueError(f"PI(smoothing={self.smoothing!r}): give ν in (-1, 1)")
        if not 0 <= self.low <= self.initial <= self.high < math.inf or (self.log_scale and self.low == 0):
            raise ValueError(
                f"PI(low={self.low!r}, initial={self.initial!r}, high={self.high!r}): "
                "need 0 < low <= initial <= high (low may be 0 with log_scale=False)"
            )

    def init(self) -> PIState:
        return PIState(self.initial, None)

    def update(self, state: PIState, error: float, applied: float | None = None) -> PIState:
        """One error, y − r. `applied`: the price in force, where this regulator did not set it."""
        if not math.isfinite(error):
            return state
        before = error if state.smoothed is None else state.smoothed
        smoothed = self.smoothing * before + (1 - self.smoothing) * error
        if applied is not None:
            return PIState(self._clip(applied), smoothed)
        change = self.integral * error + self.proportional * (smoothed - before)
        change = min(max(change, -self.rate), self.rate)
        if not self.log_scale:
            return PIState(self._clip(state.price + change), smoothed)
        position = math.log(state.price) + change
        return PIState(self._clip(math.exp(min(max(position, -700.0), 700.0))), smoothed)

    def _clip(self, price: float) -> float:
        return min(max(price, self.low), self.high)
