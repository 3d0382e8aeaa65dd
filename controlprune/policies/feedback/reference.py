"""The reference: what is asked of every resource now, and what that means in the terms of its model.

    planner      level ℓ(t) from 1 (dense) to 0 (budget), in stages            (control/: ramp, horizon)
    model's own  r_k = β_k + (1 − β_k) ℓ                 β_k: the budget, fraction of dense
    run totals   the same, with β_k solved anew from what was spent            (control/totals.py)
    measured     real use y = s m(n) of latency and energy: a limit r is r / s on the modelled use
    per step     y = 1 − s (1 − m(n)) of train_time and train_energy, as a dense step is 1 whatever of it
                 does not shrink: a limit r is 1 − (1 − r) / s                  (s: control/scale.py)

Exact resources have s = 1. Reasons to solve again (`moved`): what is asked changed by more than `MOVED` since
the last solution (a stage of the plan, a budget that the user changed); a run total asks for another use of a
step than there is, and nothing else is in the way; at the budget, a measured use left its band, from `UNDER`
below to `NOISE` above, and its model has learned since. All are fractions of dense; a run total's are of a
dense step, its sums of a run.

The plan is hastened where a run total would otherwise need an end below the smallest net. A total that even
the smallest net would miss by more than `MISSED`, `SURE` updates long, is said once, when the net is that
small: how much of a step does not shrink only the run shows, and a larger net shows it badly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ...allocate.limits import FAR, tolerances
from ...control.horizon import Horizon, HorizonState
from ...control.ramp import Plan, PlanState, Trend
from ...control.scale import Observer, ObserverState
from ...control.state import pack, unpack
from ...control.totals import hastened, mean_left, rest, steady
from ...cost.measurement import Measurement
from ...cost.problem import Problem
from ...structure.saying import warn

__all__ = ["Reference"]

MOVED = 0.005  # of dense: about half of what a solution may leave unfilled anyway (allocate/limits.py)
LITTLE = 0.05  # of a dense step: under it a timing's error of some per cent is as large as the saving
HASTE = 0.7  # on the times of a plan that turns out to be too slow for a run total, at every update again
MISSED = 0.05  # of a run total's limit: as far as a measured use may be over it unsaid (loop/ending.py)
SURE = 3  # updates in a row, as one timing may be bad
NEAR = 0.05  # of a dense step: the net is as small as it gets, but for a width step or two
LEARNED = 0.01  # of a modelled limit: what changes by less buys no other width (`ROUGH`, allocate/limits.py)
NOISE, UNDER = 0.03, 0.05  # of a limit: a measured use this far over or under it is taken to be at it


class Reference:
    """Holds the plan's state, what was spent of the run totals, and how far the models were wrong."""

    def __init__(self, plan: Plan | Horizon, stages: int, observer: Observer, problem: Problem) -> None:
        self.stages, self.observer, self.problem = stages, observer, problem
        self.level = 1.0  # position of the staged reference
        self._given = plan if isinstance(plan, Plan) else plan.towards(problem.budget.values())
        self._factor = 1.0  # on the times of the plan
        self._plan: PlanState | HorizonState = plan.init()
        self._scales = {name: observer.init() for name in sorted(problem.measured)}
        self._spent: dict[str, tuple[float, float, float]] = {}  # run total -> (spent, limit, use now)
        self._solved: dict[str, float] | None = None  # what was asked for at the last solution
        self._limits: dict[str, float] = {}  # and what that meant of the modelled use
        self._missed: set[str] = set()  # run totals that were said to be out of reach
        self._missing: dict[str, int] = {}  # for how many updates they have seemed to be

    # --- what comes in --------------------------------------------------------------------------

    def heed(self, measurements: Iterable[Measurement]) -> None:
        """What was measured since the last decision."""
        for found in measurements:
            if found.resource not in self.problem.costs:
                continue  # of a budget that was changed since
            modelled = self.problem.fraction(found.resource, found.widths)
            if found.resource in self.problem.measured:
                self.feel(found.resource, modelled, found.use, found.spread)
            if found.resource in self.problem.totals:
                self.account(found.resource, found.spent, found.limit, modelled)

    def feel(self, resource: str, modelled: float, measured: float, spread: float) -> None:
        """A measurement of the use at the widths for which the model says `modelled`."""
        if resource in self.problem.totals:  # savings are compared; next to dense they tell nothing
            saving = 1.0 - modelled
            if saving < LITTLE:
                return
            spread *= measured / saving
            modelled, measured = saving, max(1.0 - measured, LITTLE * saving)
        self._scales[resource] = self.observer.update(self._scales[resource], modelled, measured, spread)

    def account(self, resource: str, spent: float, limit: float, modelled: float) -> None:
        """What the run has used of a total so far and may use in all; `modelled`: of a step now."""
        known = resource in self._spent
        self._spent[resource] = (spent, limit, self._real(resource, modelled))
        if not known:
            self._factor = min(self._factor, hastened(limit, self._ahead_at, self._least(resource)))

    def retarget(self, problem: Problem) -> None:
        """The user changed the budget; the plan's position is kept, limits follow at the next update."""
        self.problem = problem
        self._spent = {k: v for k, v in self._spent.items() if k in problem.totals}
        self._missed.clear()
        self._scales = {k: self._scales.get(k, self.observer.init()) for k in sorted(problem.measured)}

    def begin_at(self, level: float) -> None:
        self.level = level

    def advance(self, progress: float, trend: Trend, stability: float) -> None:
        """One update of the plan; `progress`: the part of the horizon that has passed."""
        if self.level == 0.0:
            self._say_what_is_missed(progress)
        elif self._late(progress):
            self._factor *= HASTE
        plan = self._given.scaled(self._factor)
        self._plan = _update(plan, self._plan, progress, trend, stability)
        stage = 1.0 / self.stages
        position = np.ceil(self._plan.level / stage - 1e-9) * stage
        self.level = min(self.level, float(position))

    def _late(self, progress: float) -> bool:
        """Would some run total need an end below the smallest net, if the cut went on as planned?"""
        ahead = self._ahead(progress)
        return any(
            rest(mean_left(limit, spent, progress), ahead) < self._least(name)
            for name, (spent, limit, _) in self._spent.items()
        )

    def _say_what_is_missed(self, progress: float) -> None:
        for name, (spent, limit, use) in self._spent.items():
            least = self._least(name)
            if use > least + NEAR:
                continue
            end = spent + least * (1.0 - progress)
            missed = end > limit * (1.0 + MISSED)
            self._missing[name] = self._missing.get(name, 0) + 1 if missed else 0
            if self._missing[name] == SURE and name not in self._missed:
                self._missed.add(name)
                warn(
                    f"controlprune: {name} cannot end at {limit:.3g} of a dense run: {spent:.3g} is spent, "
                    f"and a step of the smallest net still takes {least:.2g} of a dense one, so {end:.3g} is "
                    "the least; the run goes on as small as it can. Loosen it (controller.budget = …), or "
                    "train for fewer steps",
                )

    # --- what is asked --------------------------------------------------------------------------

    def asked(self, progress: float) -> dict[str, float]:
        """r_k, of the real use."""
        ends = dict(self.problem.budget)
        for name, (spent, limit, use) in self._spent.items():
            if self.level > 0.0:
                end = rest(mean_left(limit, spent, progress), self._ahead(progress))
            else:
                end = steady(limit, spent, progress, use, (self._solved or {}).get(name))
            ends[name] = max(end, self._least(name))
        return {name: end + (1.0 - end) * self.level for name, end in ends.items()}

    def modelled(self, asked: Mapping[str, float]) -> dict[str, float]:
        """The limits r_k, of the modelled use; none below what the smallest net needs."""
        problem = self.problem
        least = {name: problem.fraction(name, problem.floors) * (1 + 1e-9) for name in asked}
        return {name: max(self._model(name, r), least[name]) for name, r in asked.items()}

    def realised(self, widths: tuple[int, ...]) -> dict[str, float]:
        """The real use at these widths, as far as it is known."""
        problem = self.problem
        return {name: self._real(name, problem.fraction(name, widths)) for name in problem.costs}

    def scale(self, name: str) -> float:
        return self._scales[name].scale if name in self._scales else 1.0

    def _real(self, name: str, modelled: float) -> float:
        s = self.scale(name)
        return 1.0 - s * (1.0 - modelled) if name in self.problem.totals else s * modelled

    def _model(self, name: str, real: float) -> float:
        s = self.scale(name)
        return 1.0 - (1.0 - real) / s if name in self.problem.totals else real / s

    def met(self, widths: tuple[int, ...]) -> bool:
        """Are the budgets of the model itself met, measured ones within what a measurement can tell?"""
        use, limits = self.realised(widths), self.problem.budget
        return all(use[k] <= r * (1 + (NOISE if k in self._scales else 1e-9)) for k, r in limits.items())

    @property
    def feeds_back(self) -> bool:
        """Can the reference move after the plan has come to its end?"""
        return bool(self._scales or self.problem.totals)

    def moved(self, asked: Mapping[str, float], widths: tuple[int, ...]) -> bool:
        """Is there a reason to solve again? `widths`: those of the active units."""
        if self._solved is None:
            return any(r < 1.0 for r in asked.values())
        old, use = self._solved, self.realised(widths)
        left = dict(zip(self.problem.costs, tolerances(self.problem, asked, FAR), strict=True))
        for name, r in asked.items():
            if name in self._spent and self.level == 0.0:
                wanted = r - self._spent[name][2]
                full = any(use[k] >= limit - left[k] for k, limit in asked.items() if k != name)
                away = wanted < -MOVED or (wanted > MOVED and not full)
            else:
                away = name not in old or abs(r - old[name]) > MOVED
                measured = self.level == 0.0 and name in self._scales and name not in self._spent
                outside = measured and not r * (1 - UNDER) <= use[name] <= r * (1 + NOISE)
                away |= outside and self._learned(name, r)
            if away:
                return True
        return asked.keys() != old.keys()

    def _learned(self, name: str, r: float) -> bool:
        """Is the limit of the modelled use another one than at the last solution?"""
        return name not in self._limits or abs(self._model(name, r) / self._limits[name] - 1.0) > LEARNED

    def solved(self, asked: Mapping[str, float]) -> None:
        self._solved = dict(asked)
        self._limits = {name: self._model(name, r) for name, r in asked.items()}

    def describe(self) -> list[str]:
        """How far the models of measured resources were off, for the report."""
        totals = self.problem.totals
        what = {
            name: "saved over modelled savings" if name in totals else "measured over modelled"
            for name in self._scales
        }
        return [
            f"{name}: {what[name]} {state.scale:.3f} (the limit is corrected by it)"
            for name, state in self._scales.items()
        ]

    def _least(self, name: str) -> float:
        return self._real(name, self.problem.fraction(name, self.problem.floors))

    def _ahead(self, progress: float) -> float:
        """Mean level over the steps that are left, if all goes as planned."""
        return self._given.scaled(self._factor).ahead(progress, self.level, self._plan.started)

    def _ahead_at(self, factor: float) -> float:
        return self._given.scaled(factor).ahead(0.0, 1.0, None)

    # --- saved and restored ---------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "level": self.level,
            "factor": self._factor,
            "plan": pack(self._plan),
            "scales": {name: pack(state) for name, state in self._scales.items()},
            "spent": {name: list(three) for name, three in self._spent.items()},
            "missed": sorted(self._missed),
            "solved": None if self._solved is None else dict(self._solved),
            "limits": dict(self._limits),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.level = float(state["level"])
        if not 0.0 <= self.level <= 1.0:
            raise ValueError(f"reference: level={self.level} is not from 0 to 1")
        self._factor = float(state["factor"])
        self._given.scaled(self._factor)  # an error if it cannot be
        self._plan = unpack(self._given.init(), state["plan"])
        blank: ObserverState = self.observer.init()
        self._scales = {name: unpack(blank, saved) for name, saved in state["scales"].items()}
        self._spent = {name: (float(a), float(b), float(c)) for name, (a, b, c) in state["spent"].items()}
        self._missed = {str(name) for name in state["missed"]}
        solved = state["solved"]
        self._solved = None if solved is None else {name: float(value) for name, value in solved.items()}
        self._limits = {name: float(value) for name, value in state["limits"].items()}


def _update(
    plan: Plan | Horizon, state: PlanState | HorizonState, progress: float, trend: Trend, stability: float
) -> PlanState | HorizonState:
    if isinstance(plan, Horizon):
        assert isinstance(state, HorizonState)
        return plan.update(state, progress, trend, stability)
    assert isinstance(state, PlanState)
    return plan.update(state, progress, trend, stability)
