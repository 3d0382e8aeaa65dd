"""The controller: pruning as a feedback loop.

At an update, in this order:

    observer           moments of the gate gradients           -> mean, curvature H        (observe.py)
    gate controller    statistics                              -> v_i, calibrated          (gates.py)
    trust              agreement of two disjoint windows       -> ρ ∈ [0, trust]
    planner            how far loss and values have settled    -> reference r(t)           (regulators/)
    solver             max Σ ṽ_i − λ·C(n),  C_k(n) ≤ r_k(t)    -> masks, shadow price λ    (tradeoff.py)
    regulator          y − r                                   -> price λ_k(t)             (regulators/)

FLOPs and parameters are known exactly, so the solver inverts them exactly: the realised resource meets
the reference by construction, and the price is the shadow price of the reference. The PI regulator
tracks it (back-calculation: a bumpless start), and takes over where the price itself steers:
`Control(invert=False)`, the masks then answer the price alone until the deadline.

An early value is a noisy one: values are shrunk towards the uniform allocation as far as their ranking is
not stable, and at the budget few units move at a time (caution.py).

The cut is made in stages. After the first, the units just switched off stay in the tensors for one update,
masked, where they are observed for free and may come back; then the net shrinks, provided the time saved
over the steps that are left outweighs the copying, and stays compact through the later stages. At the
budget the masks are revised every few updates, after a probe of what is absent: width moves to where it
is worth most, and units return. From `freeze` on they hold.

`start` begins below dense: at the uniform allocation of that fraction ("budget": at the budget itself), a
random choice of units, compact from the first step. The run then never pays for the dense model, and is
the directly trained small net that may still move its width to where it turns out to be worth more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..allocation import prior_values, uniform
from ..gates import Experiment, GateController, Statistics
from ..observe import LossTrend, Moments, fisher, observe, start_moments, track_loss
from ..regulators.pi import PI, PIState
from ..regulators.plan import Plan, PlanState
from ..tradeoff import Problem, Solution, solve
from .base import Decision, Setting, Trial
from .caution import Values, floors, held, slew, stability, trusted
from .pace import calibration_spacing, observation_spacing, shrink_pays

__all__ = ["Control", "ControlLoop"]

OLD = 30_000  # updates: the age of a unit that was never switched, and where ages stop


@dataclass(frozen=True)
class Control:
    """Settings of the feedback policy. Steps are optimizer steps; `None` lets the horizon decide."""

    plan: Plan = field(default_factory=lambda: Plan(earliest=0.1, latest=0.15, duration=0.3, deadline=0.5))
    regulator: PI = field(default_factory=PI)
    invert: bool = True
    learned: bool = True  # False: the second-order score without the gate network
    trust: float = 0.5  # most weight that values get against the uniform allocation
    start: float | Literal["budget"] | None = None  # fraction of dense to begin at; None: dense
    stages: int = 6  # steps of the reference on its way down
    update_every: int | None = None
    observe_every: int | None = None
    calibrate_every: int | None = None  # updates between calibrations; 0: never
    trials: int = 3  # paired ablations per calibration
    revise_every: int = (
        7  # updates between revisions of the masks at the budget, each after a probe; 0: never
    )
    dwell: int = 3  # updates that a switched unit keeps its state
    hysteresis: float = 0.3  # by how much a newcomer must be worth more than a unit that is on
    freeze: float = 0.75  # fraction of the horizon after which masks hold
    shrink: bool = True  # False: masks only

    def __post_init__(self) -> None:
        for name in ("update_every", "observe_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value!r}: give a number of steps >= 1, or None")
        for name in ("trust", "freeze"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)!r}: give a number from 0 to 1")
        for name in ("calibrate_every", "trials", "revise_every", "dwell", "hysteresis"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}={value!r}: give a number >= 0")
        if not (self.start in (None, "budget") or _is_fraction(self.start)):
            raise ValueError(f'start={self.start!r}: give a fraction of dense in (0, 1], "budget" or None')
        if self.stages < 1:
            raise ValueError(f"stages={self.stages!r}: give a number >= 1")

    def begin(self, setting: Setting) -> ControlLoop:
        return ControlLoop(self, setting)


class ControlLoop:
    """One run of `Control`: holds the states of its blocks and wires them, in the order above."""

    def __init__(self, control: Control, setting: Setting) -> None:
        self.control, self.setting = control, setting
        sizes = setting.structure.sizes
        units = sum(sizes)
        self.update_every = control.update_every or min(200, max(1, setting.total_steps // 60))
        self.observe_every = control.observe_every or observation_spacing(setting)
        self.calibrate_every = _calibrate_every(control, setting, self.update_every)
        memory = min(500.0, max(20.0, 0.05 * setting.total_steps / self.observe_every))
        self.decay = 1.0 - 1.0 / memory
        self.batch = setting.batch
        self.moments = start_moments(units)
        # Σ g² of the running and of the last window; its rounding is far under its sampling error
        self.window = torch.zeros(2, units, dtype=torch.bfloat16)
        self.weights: Tensor | None = None  # known from the norms' arrival to the next decision
        self.age = torch.full((units,), OLD, dtype=torch.int16)  # updates since the last change
        self.trend = LossTrend()
        self.gates = GateController(seed=setting.seed)
        self.plan: PlanState = control.plan.init()
        self.prices: dict[str, PIState] = {k: control.regulator.init() for k in setting.costs}
        self.random = torch.Generator().manual_seed(setting.seed)
        self.level = 1.0  # position of the staged reference between dense (1) and budget (0)
        self.at_budget = False  # was the budget reached before this update?
        self.updates = 0
        self.watching = False  # units switched off at the last update are still in the tensors

    def first(self) -> Decision | None:
        """Where to begin: nothing to do (dense), or the uniform allocation at `start`, units at random."""
        start, budget = self.control.start, self.setting.budget
        if start is None or not budget:
            return None
        above = [] if start == "budget" else [(start - r) / (1.0 - r) for r in budget.values() if r < 1.0]
        self.level = max(0.0, *above, 0.0)
        reference = self._staged()
        masks = []
        for size, width in zip(self.setting.structure.sizes, self._uniform(reference), strict=True):
            mask = torch.zeros(size, dtype=torch.bool)
            mask[torch.randperm(size, generator=self.random)[:width]] = True
            masks.append(mask)
        return Decision(tuple(masks), self.control.shrink, reference, self._price(), "start")

    # --- what the loop asks for -----------------------------------------------------------------

    def wants_gradients(self, step: int) -> bool:
        return step % self.observe_every == 0 and not self._frozen(step)

    def wants_decision(self, step: int) -> bool:
        return step % self.update_every == 0 or step == self._freeze_step

    def wants_batch(self, step: int) -> bool:
        """Is step's batch to be recorded, for a calibration or a probe?"""
        return (
            self.wants_decision(step) and not self._frozen(step) and (self._calibrates() or self._revises())
        )

    def _calibrates(self) -> bool:
        """Does the update that comes next calibrate?"""
        return self.calibrate_every > 0 and (self.updates + 1) % self.calibrate_every == 0

    def _revises(self) -> bool:
        every = self.control.revise_every
        return self.level == 0.0 and every > 0 and (self.updates + 1) % every == 0

    def wants_probe(self, step: int, compact: bool) -> bool:
        return compact and self._revises() and not self._frozen(step)

    @property
    def _freeze_step(self) -> int:
        return int(self.control.freeze * self.setting.total_steps)

    def _frozen(self, step: int) -> bool:
        return step > self._freeze_step

    # --- observer -------------------------------------------------------------------------------

    def see_batch(self, examples: int) -> None:
        """How many examples a mini-batch of the training holds: the scale between variance and Fisher."""
        self.batch = max(1, examples)

    def observe(self, gradients: Tensor, weights: Tensor) -> None:
        self.moments = observe(self.moments, gradients, self.decay)
        self.window[0] += torch.nan_to_num(gradients, nan=0.0, posinf=0.0, neginf=0.0) ** 2
        self.weights = weights if bool(weights.isfinite().all()) else self.weights

    def watch(self, step: int, loss: float) -> None:
        self.trend = track_loss(self.trend, loss, self.setting.total_steps)

    def statistics(self, step: int, on: Tensor) -> Statistics:
        mean, curvature = fisher(self.moments, self.decay, self.batch)
        horizon = max(1, self.setting.total_steps)
        age = (self.age.float() * self.update_every / horizon).clamp_max(1.0)
        weights = torch.ones(len(on)) if self.weights is None else self.weights
        return Statistics(
            mean, curvature, weights, self._marginal_costs(on), age, on, self._group(),
            self.trend.slope, min(1.0, step / horizon),
        )  # fmt: skip

    def _group(self) -> Tensor:
        """The number of each unit's group."""
        sizes = torch.tensor(self.setting.structure.sizes)
        return torch.repeat_interleave(torch.arange(len(sizes)), sizes)

    def _marginal_costs(self, on: Tensor) -> Tensor:
        """Fraction of dense that one unit of each group costs at the present widths, over all resources."""
        widths = _widths(torch.split(on, list(self.setting.structure.sizes)))
        one = np.ones(len(widths))
        total = np.zeros(len(widths))
        for name, cost in self.setting.costs.items():
            total += cost.marginals(widths, one) / self.setting.dense[name]
        return torch.from_numpy(total).float()[self._group()]

    # --- gate controller ------------------------------------------------------------------------

    def trials(self, step: int, masks: tuple[Tensor, ...], compact: bool) -> list[Trial]:
        """Random small sets of live units of random groups; every third of dormant ones, if masked."""
        if not self._calibrates() or self._frozen(step):
            return []
        found: list[Trial] = []
        for k in range(self.control.trials):
            g = int(torch.randint(len(masks), (1,), generator=self.random))
            off = compact or k % 3 != 2 or bool(masks[g].all())
            pool = torch.nonzero(masks[g] if off else ~masks[g]).flatten()
            count = min(len(pool) - 1 if off else len(pool), max(1, len(masks[g]) // 16), 16)
            if count > 0:
                chosen = torch.randperm(len(pool), generator=self.random)[:count]
                found.append(Trial(g, pool[chosen], off))
        return found

    def learn(self, step: int, masks: tuple[Tensor, ...], outcomes: list[Experiment]) -> None:
        s = self.statistics(step, torch.cat(masks))
        self.gates.record(s, outcomes)
        price = sum(state.price for state in self.prices.values()) / max(1, len(self.prices))
        self.gates.learn(s, price, rounds=8)

    # --- the update -----------------------------------------------------------------------------

    def decide(self, step: int, masks: tuple[Tensor, ...], compact: bool) -> Decision:
        revises, level = self._revises(), self.level
        self.updates += 1
        self.age = (self.age + 1).clamp_max(OLD)
        stability = self._stability(torch.cat(masks))
        reference = self._reference(step, stability)
        always = not self.control.invert or bool(self.setting.prices)
        if self._frozen(step) or not (revises or self.watching or self.level < level or always):
            return self._hold(step, masks, compact, reference)
        exact = self.control.invert and not self.setting.prices
        solution = self._solve(step, masks, stability, reference, exact=exact)
        return self._answer(step, masks, compact, reference, solution)

    def last(self, masks: tuple[Tensor, ...]) -> Decision:
        """For `finalize`: the present masks if they meet the budget, else the budget enforced."""
        reference = dict(self.setting.budget)
        widths = tuple(_widths(masks))
        if all(self.setting.fraction(k, widths) <= r * (1 + 1e-9) for k, r in reference.items()):
            return Decision(masks, True, reference, self._price())
        step = self.setting.total_steps
        self.age.fill_(OLD)  # no dwell, no slew: the budget comes first
        self.at_budget = False
        stability = self._stability(torch.cat(masks))
        solution = self._solve(step, masks, stability, reference, exact=True)
        return self._answer(step, masks, False, reference, solution)

    def _hold(
        self, step: int, masks: tuple[Tensor, ...], compact: bool, reference: Mapping[str, float]
    ) -> Decision:
        self.weights = None
        shrinks = self.control.shrink and (compact or self._pays(step, _widths(masks)))
        return Decision(masks, shrinks, reference, self._price())

    def _price(self) -> dict[str, float]:
        return {k: s.price for k, s in self.prices.items()} | dict(self.setting.prices)

    def _stability(self, on: Tensor) -> float:
        """Of the values, between the running window and the last; then the running one becomes the last."""
        now, before = self.window.float()
        self.window = torch.stack([torch.zeros_like(self.window[0]), self.window[0]])
        return stability(now, before, self._group(), on)

    def _reference(self, step: int, stability: float) -> dict[str, float]:
        """The plan's position between dense and budget, in stages, as a fraction per resource."""
        self.plan = self.control.plan.update(
            self.plan, step / self.setting.total_steps, self.trend, stability
        )
        stage = 1.0 / self.control.stages
        position = np.ceil(self.plan.level / stage - 1e-9) * stage
        self.at_budget = self.level == 0.0
        self.level = min(self.level, float(position))
        return self._staged()

    def _staged(self) -> dict[str, float]:
        return {k: r + (1.0 - r) * self.level for k, r in self.setting.budget.items()}

    def _uniform(self, reference: Mapping[str, float]) -> tuple[int, ...]:
        """n̄ at the reference; empty where nothing is to be met."""
        if not reference:
            return ()
        costs = [self.setting.costs[k] for k in reference]
        limits = np.array([r * self.setting.dense[k] for k, r in reference.items()])
        return uniform(self.setting.structure.sizes, costs, limits, self.setting.floors, self.setting.steps)

    def _values(self, step: int, masks: tuple[Tensor, ...], trust: float, even: tuple[int, ...]) -> Values:
        """ṽ per group."""
        sizes = self.setting.structure.sizes
        v = self.gates.values(self.statistics(step, torch.cat(masks))).double()
        values = tuple(x.numpy() for x in torch.split(v, list(sizes)))
        if not even:
            return values
        costs = [self.setting.costs[k] for k in self.setting.budget]
        shares = 1.0 / np.array([self.setting.dense[k] for k in self.setting.budget])
        return trusted(values, prior_values(even, costs, sizes, shares), even, trust)

    def _solve(
        self,
        step: int,
        masks: tuple[Tensor, ...],
        stability: float,
        reference: Mapping[str, float],
        *,
        exact: bool,
    ) -> Solution:
        """The trade-off under the reference as a limit (`exact`), or under the price alone."""
        setting, control = self.setting, self.control
        names = tuple(setting.costs)
        dense = np.array([setting.dense[k] for k in names])
        trust, most = control.trust * stability, slew(setting.structure.sizes, setting.steps)
        even = self._uniform(reference)
        values = self._values(step, masks, trust, even)
        least = setting.floors
        if even:
            binding = most if self.at_budget else None
            least = floors(least, setting.steps, even, trust, _widths(masks), binding)
        price = np.array([0.0 if exact else self._price()[k] for k in names]) / dense
        limits = np.array([reference.get(k, np.inf) if exact else np.inf for k in names]) * dense
        young = torch.split(self.age < control.dwell, list(setting.structure.sizes))
        problem = Problem(
            values=values,
            costs=tuple(setting.costs.values()),
            limits=limits,
            prices=price,
            floors=least,
            steps=setting.steps,
            grains=setting.grains,
            masks=tuple(m.numpy() for m in masks),
            held=held(values, masks, young, most),
            hysteresis=control.hysteresis,
            resources=names,
        )
        solution = solve(problem)
        free = replace(problem, held=None)
        for easier in (free, replace(free, floors=setting.floors)) if exact else ():
            if not (limits - solution.costs > problem.tolerance * dense).all():
                break  # some limit is filled; else what keeps them from it gives way, holds first
            solution = solve(easier)
        return solution

    def _answer(
        self,
        step: int,
        before: tuple[Tensor, ...],
        compact: bool,
        reference: Mapping[str, float],
        solution: Solution,
    ) -> Decision:
        masks = tuple(torch.from_numpy(np.array(m)) for m in solution.masks)
        was, now = torch.cat(before), torch.cat(masks)
        self.weights = None
        self.age = self.age.masked_fill(was != now, 0)
        news = bool((was & ~now).any())
        self._regulate(reference, solution)
        settled = self.watching or not news  # they have had their update under observation, or there are none
        shrinks = self.control.shrink and (compact or (settled and self._pays(step, solution.widths)))
        self.watching = news and not shrinks and not self.watching
        return Decision(masks, shrinks, reference, self._price())

    def _regulate(self, reference: Mapping[str, float], solution: Solution) -> None:
        """The price of each resource: tracks the shadow price where a limit binds, or acts on y − r."""
        for k, name in enumerate(self.setting.costs):
            dense = self.setting.dense[name]
            shadow = float(solution.prices[k]) * dense
            if name not in reference or (self.control.invert and shadow <= 0.0):
                continue
            error = float(solution.costs[k]) / dense - reference[name]
            applied = shadow if self.control.invert else None
            self.prices[name] = self.control.regulator.update(self.prices[name], error, applied)

    def _pays(self, step: int, widths: Sequence[int]) -> bool:
        setting = self.setting
        fraction = setting.fraction(next(iter(setting.costs)), tuple(widths))
        return shrink_pays(setting, fraction, setting.total_steps - step)

    # --- saved and restored ---------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {name: getattr(self, name) for name in _PLAIN}
        state |= {name: getattr(self, name).clone() for name in _TENSORS}
        return state | {
            "moments": vars(self.moments) | {},
            "trend": vars(self.trend) | {},
            "plan": vars(self.plan) | {},
            "prices": {k: vars(p) | {} for k, p in self.prices.items()},
            "gates": self.gates.state_dict(),
            "random": self.random.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in _PLAIN:
            setattr(self, name, state[name])
        for name in _TENSORS:
            setattr(self, name, _like(state[name], getattr(self, name)))
        self.moments = Moments(**{k: _like(state["moments"][k], v) for k, v in vars(self.moments).items()})
        self.trend = LossTrend(**state["trend"])
        self.plan = PlanState(**state["plan"])
        self.prices = {k: PIState(**p) for k, p in state["prices"].items()}
        self.gates.load_state_dict(state["gates"])
        self.random.set_state(state["random"])


_PLAIN = ("batch", "level", "at_budget", "updates", "watching")
_TENSORS = ("window", "age")


def _like(value: Tensor, present: Tensor) -> Tensor:
    if value.shape != present.shape or value.dtype != present.dtype:
        raise ValueError(
            f"a vector of {tuple(value.shape)} {value.dtype} where {tuple(present.shape)} belongs"
        )
    return value


def _is_fraction(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and 0.0 < value <= 1.0


def _calibrate_every(control: Control, setting: Setting, update_every: int) -> int:
    if not control.learned or control.trials == 0:
        return 0
    if control.calibrate_every is not None:
        return control.calibrate_every
    return calibration_spacing(setting, control.trials, update_every)


def _widths(masks: Sequence[Tensor]) -> list[int]:
    return [int(m.sum()) for m in masks]
