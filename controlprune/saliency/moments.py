"""The observer: gradients and loss of the running training -> statistics per unit.

At an observed step the plant reports, for every unit i, the derivative of the mini-batch loss with
respect to a gate on its output,

    g_i = ∂L/∂g_i = Σ ⟨w, ∂w⟩        over the columns that read the unit          [loss]

and the observer keeps exponential moments of it, each unit with its own count (a unit that is
physically absent is not observed, its entry is NaN and its moments rest):

    m ← β m + (1 − β) g,      s ← β s + (1 − β) g²,      k ← k + 1
    mean = m / (1 − β^k),     var = s / (1 − β^k) − mean²

With a mini-batch of B examples the Fisher diagonal of the gate, an estimate of its curvature, is
H = B·var + mean² (the mean of B per-example gradients has 1/B of their variance). The second-order
value of the unit, the rise of the loss if it were off, is then

    v = L(off) − L(on) ≈ −mean + ½ H    if on  (expansion at g = 1)
                       ≈ −mean − ½ H    if off (expansion at g = 0)

Near a minimum mean → 0 and only the ½ H term tells units apart. All vectors have one entry per unit,
all groups concatenated, float32; a count is an int16 and stops at `MANY`, where β^k is long 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LossTrend", "Moments", "fisher", "observe", "start_moments", "track_loss"]


MANY = 30_000


@dataclass(frozen=True)
class Moments:
    """Exponential moments of the gate gradient of every unit, `count` observations each."""

    first: Tensor
    second: Tensor
    count: Tensor


def start_moments(units: int) -> Moments:
    zero = torch.zeros(units, dtype=torch.float32)
    return Moments(zero, zero.clone(), torch.zeros(units, dtype=torch.int16))


def observe(moments: Moments, gradient: Tensor, decay: float) -> Moments:
    """One step of the recurrence above; NaN entries of `gradient` are not observed."""
    seen = torch.isfinite(gradient)
    if bool(seen.all()):
        rate = 1.0 - decay
        first, second = moments.first.lerp(gradient, rate), moments.second.lerp(gradient.square(), rate)
        return Moments(first, second, (moments.count + 1).clamp_max(MANY))
    rate = seen.to(gradient.dtype) * (1.0 - decay)
    g = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
    return Moments(
        moments.first + rate * (g - moments.first),
        moments.second + rate * (g * g - moments.second),
        (moments.count + seen).clamp_max(MANY),
    )


def _corrected(moments: Moments, decay: float) -> tuple[Tensor, Tensor]:
    weight = (1.0 - decay**moments.count).clamp_min(1.0 - decay)
    return moments.first / weight, moments.second / weight


def fisher(moments: Moments, decay: float, batch: int) -> tuple[Tensor, Tensor]:
    """Mean gate gradient and Fisher diagonal H = B·var + mean²."""
    mean, square = _corrected(moments, decay)
    variance = (square - mean * mean).clamp_min(0.0)
    return mean, batch * variance + mean * mean


@dataclass(frozen=True)
class LossTrend:
    """Fast and slow exponential means of the loss, and of its squared step-to-step scatter."""

    fast: float = 0.0
    slow: float = 0.0
    scatter: float = 0.0
    count: int = 0

    @property
    def slope(self) -> float:
        """Relative fall from the slow to the fast mean: 0 when settled, > 0 while still falling."""
        return (self.slow - self.fast) / max(abs(self.slow), 1e-300)


def track_loss(trend: LossTrend, loss: float, horizon: int) -> LossTrend:
    """Update with one loss; time constants 1 % and 5 % of the horizon (at least 5 and 20 steps)."""
    if trend.count == 0:
        return LossTrend(loss, loss, 0.0, 1)
    fast_rate = 1.0 / min(max(5.0, 0.01 * horizon), trend.count + 1.0)
    slow_rate = 1.0 / min(max(20.0, 0.05 * horizon), trend.count + 1.0)
    return LossTrend(
        trend.fast + fast_rate * (loss - trend.fast),
        trend.slow + slow_rate * (loss - trend.slow),
        trend.scatter + slow_rate * ((loss - trend.fast) ** 2 - trend.scatter),
        trend.count + 1,
    )
