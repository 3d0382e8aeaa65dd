"""The reference by receding horizon: doses planned over an identified response of the loss to cutting.

The level ℓ goes from 1 (dense) to 0 (budget) in doses d_i ≥ 0, one per update i; r_k = β_k + (1 − β_k) ℓ.
A dose raises the loss and the rise heals; relative excess h of the loss over its trend, per update::

    h_{i+1} = ρ h_i + κ d_i                      ρ, κ by recursive least squares (control/least_squares.py)

A unit switched off on a wrong value is a loss that does not heal; how much is wrong falls as values
settle: with the stability s now, 1 − s_i = (1 − s) 2^{−(τ_i − τ)/settling}. At every update the whole rest
is planned, and its first dose given::

    minimise    Σ_i κ [ρ^{n_i} + mistrust (1 − s_i)] d_i  +  ½ bend κ Σ_i d_i²  +  saving Σ_i r_i Δτ
    subject to  d ≥ 0,   Σ_i d_i = ℓ,   Σ_i (β + (1 − β) ℓ_i) Δτ + spent ≤ total      (n_i: updates left)

so a cut early, late, in many small doses or at once comes out of what the run shows, and not from a fixed
curve. `saving` is the relative rise of the loss that a whole dense run's compute is worth; `total` a limit
on the run's compute (fraction of dense), met if any plan meets it, else cut at once. ℓ = 0 from `deadline`
on, whatever is observed. Separable and convex, so solved exactly: d_i = [(μ − c_i) / q]₊, μ by bisection
(`doses`), the multiplier of `total` by another.

Limit cases: saving → ∞ (or total at its least) cuts at once; κ → 0 does too; mistrust → ∞ waits for the
deadline; saving = mistrust = 0 and ρ = 1 spreads the doses evenly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .least_squares import LeastSquares, LeastSquaresState
from .ramp import Trend

__all__ = ["Horizon", "HorizonState", "doses"]

Array = NDArray[np.float64]
SPREAD = 30.0  # doubt about (ρ, κ), 0.3, over the noise of the relative loss, 0.01


def doses(linear: Array, bend: float, amount: float) -> Array:
    """argmin Σ c_i d_i + ½ q Σ d_i² over d ≥ 0 with Σ d_i = amount: d_i = [(μ − c_i)/q]₊.

    μ in closed form: with c sorted, the first m doses are positive for the m with c_m < μ_m =
    (q amount + Σ_{i≤m} c_i)/m.
    """
    ordered = np.sort(linear)
    levels = (bend * amount + np.cumsum(ordered)) / np.arange(1, len(ordered) + 1)
    used = max(1, int((ordered < levels).sum()))
    return np.maximum(levels[used - 1] - linear, 0.0) / bend


@dataclass(frozen=True, eq=False)
class HorizonState:
    level: float  # ℓ
    progress: float  # τ of the last update
    spent: float  # ∫ r dτ so far, fraction of a dense run
    best: float  # least fast mean of the loss
    excess: float  # h at the last update
    dose: float  # given at the last update
    started: float | None  # τ of the first dose
    fit: LeastSquaresState  # (ρ, κ)


@dataclass(frozen=True)
class Horizon:
    """Settings of the receding horizon, a drop-in for `Plan`. Times are fractions of the run.

    `earliest`, `deadline`: when the cut may begin and must be over. `saving`: the relative rise of the loss
    that a dense run's compute is worth. `mistrust`: how much of a dose on values that have not settled
    never heals; `settling`: the time in which 1 − stability halves. `bend`: cost of large doses. `budget`:
    β that `saving` and `total` count with (in a run, the tightest one asked for). `total`: limit on the
    run's compute, fraction of dense. `healing`, `damage`: ρ and κ that are believed before anything is
    seen; `forgetting`: memory of their recursive least squares, per update.
    """

    earliest: float = 0.02
    deadline: float = 0.5
    saving: float = 0.1
    mistrust: float = 0.5
    settling: float = 0.05
    bend: float = 5.0
    budget: float = 0.5
    total: float | None = None
    healing: float = 0.9
    damage: float = 0.5
    forgetting: float = 0.98

    def __post_init__(self) -> None:
        if not 0 <= self.earliest <= self.deadline <= 1:
            raise ValueError(
                f"Horizon(earliest={self.earliest!r}, deadline={self.deadline!r}): "
                "need 0 <= earliest <= deadline <= 1"
            )
        for name in ("settling", "bend", "budget", "damage"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"Horizon({name}={getattr(self, name)!r}): give a number > 0")
        for name in ("saving", "mistrust"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"Horizon({name}={getattr(self, name)!r}): give a number >= 0")
        if not 0 < self.healing <= 1:
            raise ValueError(f"Horizon(healing={self.healing!r}): give a share per update in (0, 1]")

    @property
    def heeds_values(self) -> bool:
        """Does the stability of the values decide anything?"""
        return self.mistrust > 0.0

    def _squares(self) -> LeastSquares:
        return LeastSquares((self.healing, self.damage), spread=SPREAD, forgetting=self.forgetting)

    def init(self) -> HorizonState:
        return HorizonState(1.0, 0.0, 0.0, math.inf, 0.0, 0.0, None, self._squares().init())

    def update(self, state: HorizonState, progress: float, trend: Trend, stability: float) -> HorizonState:
        """The level at `progress`: learn from the loss, plan the rest, give the first dose."""
        passed = max(progress - state.progress, 0.0)
        spent = state.spent + passed * self._use(state.level)
        state = replace(self._learn(state, trend), spent=spent, progress=progress, dose=0.0)
        began = state.started if state.started is not None else progress
        if progress >= self.deadline:
            return replace(state, level=0.0, dose=state.level, started=began)
        if progress < self.earliest or state.level <= 0:
            return state
        plan = self.plan(state, max(passed, (1 - progress) / 1000), stability)
        dose = min(float(plan[0]), state.level)
        started = began if dose > 0 else state.started
        return replace(state, level=state.level - dose, dose=dose, started=started)

    def scaled(self, factor: float) -> Horizon:
        """The same planner with its times multiplied."""
        return replace(self, earliest=factor * self.earliest, deadline=factor * self.deadline)

    def towards(self, budgets: Iterable[float]) -> Horizon:
        """With the β of the tightest of these budgets."""
        return replace(self, budget=min(budgets, default=self.budget))

    def ahead(self, progress: float, level: float, started: float | None) -> float:
        """Mean level over the rest of the horizon at the latest: an even descent to the deadline."""
        if progress >= 1.0:
            return level
        return level * min(1.0, 0.5 * max(self.deadline - progress, 0.0) / (1.0 - progress))

    def plan(self, state: HorizonState, spacing: float, stability: float) -> Array:
        """Doses now and at every update until the deadline, `spacing` apart."""
        count = max(1, math.ceil((self.deadline - state.progress) / spacing - 1e-9))
        ahead = spacing * np.arange(count)
        heal, damage = self.response(state)
        left = 1 - state.progress - ahead  # of the run, after the dose
        doubt = min(max(1 - stability, 0.0), 1.0) * 0.5 ** (ahead / self.settling)
        harm = damage * (heal ** (left / spacing) + self.mistrust * doubt)
        saved = (1 - self.budget) * left  # of the run's compute, per dose
        curve = self.bend * damage
        best = doses(harm - self.saving * saved, curve, state.level)
        if self.total is None:
            return best
        needed = state.spent + self._use(state.level) * (1 - state.progress) - self.total
        low, high = 0.0, 1.0
        while best @ saved < needed and high < 1e9:  # the multiplier of `total`
            low, high = high, high * 4
            best = doses(harm - (self.saving + high) * saved, curve, state.level)
        for _ in range(40 if low or high > 1 else 0):
            middle = (low + high) / 2
            trial = doses(harm - (self.saving + middle) * saved, curve, state.level)
            low, high, best = (low, middle, trial) if trial @ saved >= needed else (middle, high, best)
        return best

    def response(self, state: HorizonState) -> tuple[float, float]:
        """(ρ, κ) as identified, within what can be."""
        heal, damage = state.fit.theta
        return float(np.clip(heal, 0.0, 1.0)), float(np.clip(damage, 1e-3 * self.damage, 1e3 * self.damage))

    def _use(self, level: float) -> float:
        return self.budget + (1 - self.budget) * level

    def _learn(self, state: HorizonState, trend: Trend) -> HorizonState:
        if not math.isfinite(trend.fast):
            return state
        best = min(state.best, trend.fast)
        excess = (trend.fast - best) / max(abs(best), 1e-12)
        fit = state.fit
        if state.dose > 0 or state.excess > 0:
            fit = self._squares().update(fit, (state.excess, state.dose), excess)
        return replace(state, best=best, excess=excess, fit=fit)
