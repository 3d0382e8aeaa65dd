"""The reference: when the cut starts, how fast it goes, and that it is over in time.

The level ℓ runs from 1 (dense) to 0 (budget); a resource with the budget β (fraction of dense) is asked
to follow r_k = β_k + (1 − β_k) ℓ. With τ the fraction of the horizon that has passed::

    start      at the first τ ≥ earliest with |slope| ≤ flat and stability ≥ agreement, at `latest` else
    health     h = clip(2 − (loss − best) / (tolerance · σ), 0, 1)         (1: full speed, 0: hold)
    descent    ℓ ← ℓ − h Δτ / duration
    deadline   ℓ ← min(ℓ, (deadline − τ) / (deadline − latest))            (whatever happens)

so ℓ = 0 from `deadline` on. `slope` is the relative fall of the loss between a slow and a fast mean,
`stability` the agreement of values between windows (1: the same ranking); `loss` is the fast mean, σ the
scatter of single losses about it and `best` the least fast mean since just before the start, so the cut
waits while the loss is above where it was and not just noisy.

Limit cases: earliest = latest = deadline = 0 starts at the budget; latest = earliest is a fixed start;
tolerance = inf is a fixed linear ramp of length `duration`; duration = 0 cuts in one step.
τ, earliest, latest, deadline, duration: fractions of the horizon. tolerance, flat, agreement: ratios.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Protocol

__all__ = ["Plan", "PlanState", "Trend"]


class Trend(Protocol):
    """What the planner reads of the loss."""

    @property
    def fast(self) -> float: ...  # short mean of the loss
    @property
    def scatter(self) -> float: ...  # mean square of single losses about it
    @property
    def slope(self) -> float: ...  # relative fall; 0 when settled


@dataclass(frozen=True)
class PlanState:
    level: float  # ℓ
    progress: float  # τ of the last update
    started: float | None  # τ at which the cut started
    best: float  # least fast mean of the loss since the start


@dataclass(frozen=True)
class Plan:
    """When and how fast the budget is approached. Times are fractions of the run.

    `earliest`: before it nothing is cut. `latest`: from here on it is, settled or not. `deadline`: by then
    the budget is reached. `duration`: from the start of the cut to the budget if nothing holds it. `flat`:
    relative fall of the loss up to which it counts as settled. `agreement`: of values between windows from
    which they do (1: the same ranking). `tolerance`: rise of the loss, in units of its scatter, at which
    the cut waits; inf never waits. `update` is called once per controller update, with τ not falling.

    As it stands, the cut begins at once and is on the slowest descent that is in time, so `flat`, `agreement`
    and `tolerance` decide nothing: the first two act where `earliest` < `latest`, the last where `duration` <
    `deadline` − `latest`.
    """

    earliest: float = 0.0
    latest: float = 0.0
    deadline: float = 0.3
    duration: float = 0.3
    flat: float = 0.05
    agreement: float = 0.5
    tolerance: float = 0.5

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value >= 0 or (value == math.inf and field.name != "tolerance"):
                raise ValueError(f"Plan({field.name}={value!r}): give a number >= 0")
        if not self.earliest <= self.latest <= self.deadline <= 1:
            raise ValueError(
                f"Plan(earliest={self.earliest!r}, latest={self.latest!r}, deadline={self.deadline!r}): "
                "need earliest <= latest <= deadline <= 1"
            )

    @property
    def heeds_values(self) -> bool:
        """Does the stability of the values decide anything?"""
        return self.earliest < self.latest and self.agreement > 0.0

    def init(self) -> PlanState:
        return PlanState(1.0, 0.0, None, math.inf)

    def update(self, state: PlanState, progress: float, trend: Trend, stability: float) -> PlanState:
        """The level at `progress`, from how the loss and the values stand."""
        started = state.started
        if started is None and self._starts(progress, trend, stability):
            started = progress
        best = state.best if started is None else min(state.best, trend.fast)
        level = state.level
        if started is not None:
            passed = max(0.0, progress - max(state.progress, started))  # a longer horizon sets τ back
            level = self._descend(level, passed, self._health(trend, best))
        return PlanState(min(level, self._ceiling(progress)), progress, started, best)

    def scaled(self, factor: float) -> Plan:
        """The same plan with all its times multiplied."""
        times = ("earliest", "latest", "deadline", "duration")
        return replace(self, **{name: factor * getattr(self, name) for name in times})

    def ahead(self, progress: float, level: float, started: float | None) -> float:
        """Mean level over the rest of the horizon, if the cut starts at the latest and nothing holds it."""
        if progress >= 1.0:
            return level
        waits = max(self.latest - progress, 0.0) if started is None else 0.0
        return level * min(1.0, (waits + 0.5 * level * self.duration) / (1.0 - progress))

    def _starts(self, progress: float, trend: Trend, stability: float) -> bool:
        settled = abs(trend.slope) <= self.flat and stability >= self.agreement
        return progress >= self.latest or (progress >= self.earliest and settled)

    def _descend(self, level: float, passed: float, health: float) -> float:
        if health * passed >= self.duration:  # the whole way at once
            return 0.0 if health > 0 else level
        return max(0.0, level - health * passed / self.duration)

    def _health(self, trend: Trend, best: float) -> float:
        if not math.isfinite(trend.fast) or self.tolerance == math.inf:
            return 1.0 if self.tolerance == math.inf else 0.0
        excess = trend.fast - best
        room = self.tolerance * math.sqrt(max(trend.scatter, 0.0))
        if excess <= room:
            return 1.0
        return 0.0 if room == 0 else min(1.0, max(0.0, 2.0 - excess / room))

    def _ceiling(self, progress: float) -> float:
        if progress >= self.deadline:
            return 0.0
        if progress <= self.latest:
            return 1.0
        return (self.deadline - progress) / (self.deadline - self.latest)
