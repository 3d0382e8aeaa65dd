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

An early value is a noisy one. With `order` the ranking of the units inside a group, and ρ the trust,

    ṽ_(j) = ρ v_(j) + (1 − ρ) s π_(j)

where π is the prior whose best allocation is the uniform one (allocation.py) and s brings it to the
scale of v at the margin: without trust the loop decides *which* units of a group, not how many. Nor may
a group fall below (1 − ρ) of its width n̄_g in the uniform allocation.

The cut is made in stages. After the first, the units just switched off stay in the tensors for one update,
masked, where they are observed for free and may come back; then the net shrinks, provided the time saved
over the steps that are left outweighs the copying, and stays compact through the later stages. At the
budget the masks are revised every few updates, after a probe of what is absent: width moves to where it
is worth most, and units return. From `freeze` on they hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..allocation import prior_values, uniform
from ..gates import Experiment, GateController, Statistics
from ..observe import LossTrend, fisher, observe, start_moments, track_loss
from ..regulators.pi import PI, PIState
from ..regulators.plan import Plan, PlanState
from ..tradeoff import Problem, Solution, solve
from .base import Decision, Setting, Trial

__all__ = ["Control", "ControlLoop"]

CALIBRATION_SHARE = 0.015  # of the training's compute that paired ablations may take
COPY_BYTES_PER_SECOND = 2e9  # a cautious guess of what a shrink moves; decisions must not hang on a clock,
FLOPS_PER_SECOND = 2e10  # or the same seed would not give the same run


@dataclass(frozen=True)
class Control:
    """Settings of the feedback policy. Steps are optimizer steps; `None` lets the horizon decide."""

    plan: Plan = field(default_factory=lambda: Plan(earliest=0.1, latest=0.15, duration=0.3, deadline=0.5))
    regulator: PI = field(default_factory=PI)
    invert: bool = True
    learned: bool = True  # False: the second-order score without the gate network
    trust: float = 0.5  # most weight that values get against the uniform allocation
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
        self.group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        self.update_every = control.update_every or min(200, max(1, setting.total_steps // 60))
        self.observe_every = control.observe_every or _spacing(setting)
        self.calibrate_every = _calibration_spacing(control, self.update_every)
        memory = min(500.0, max(20.0, 0.05 * setting.total_steps / self.observe_every))
        self.decay = 1.0 - 1.0 / memory
        self.batch = setting.batch
        self.moments = start_moments(units)
        self.window = torch.zeros(2, units)  # Σ g² of the running and of the last window
        self.weights = torch.ones(units)
        self.switched = torch.full((units,), -(10**9))  # step of the last change
        self.trend = LossTrend()
        self.gates = GateController(seed=setting.seed)
        self.plan: PlanState = control.plan.init()
        self.prices: dict[str, PIState] = {k: control.regulator.init() for k in setting.costs}
        self.random = torch.Generator().manual_seed(setting.seed)
        self.level = 1.0  # position of the staged reference between dense (1) and budget (0)
        self.at_budget = False  # was the budget reached before this update?
        self.updates = 0
        self.watching = False  # units switched off at the last update are still in the tensors

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
        self.weights = torch.where(torch.isfinite(weights), weights, self.weights)

    def watch(self, step: int, loss: float) -> None:
        self.trend = track_loss(self.trend, loss, self.setting.total_steps)

    def statistics(self, step: int, on: Tensor) -> Statistics:
        mean, curvature = fisher(self.moments, self.decay, self.batch)
        horizon = max(1, self.setting.total_steps)
        age = ((step - self.switched).float() / horizon).clamp(0.0, 1.0)
        return Statistics(
            mean, curvature, self.weights, self._marginal_costs(on), age, on, self.group,
            self.trend.slope, min(1.0, step / horizon),
        )  # fmt: skip

    def _widths(self, masks: tuple[Tensor, ...]) -> np.ndarray:
        return np.array([int(m.sum()) for m in masks])

    def _marginal_costs(self, on: Tensor) -> Tensor:
        """Fraction of dense that one unit of each group costs at the present widths, over all resources."""
        widths = self._widths(torch.split(on, list(self.setting.structure.sizes)))
        one = np.ones(len(widths))
        total = np.zeros(len(widths))
        for name, cost in self.setting.costs.items():
            total += cost.marginals(widths, one) / self.setting.dense[name]
        return torch.from_numpy(total).float()[self.group]

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
        stability = self._stability(torch.cat(masks))
        reference = self._reference(step, stability)
        always = not self.control.invert or bool(self.setting.prices)
        if self._frozen(step) or not (revises or self.watching or self.level < level or always):
            return self._hold(step, masks, compact, reference)
        return self._answer(step, masks, compact, reference, self._solve(step, masks, stability, reference))

    def last(self, masks: tuple[Tensor, ...]) -> Decision:
        """For `finalize`: the present masks if they meet the budget, else the budget enforced."""
        reference = dict(self.setting.budget)
        widths = tuple(int(n) for n in self._widths(masks))
        if all(self.setting.fraction(k, widths) <= r * (1 + 1e-9) for k, r in reference.items()):
            return Decision(masks, True, reference, self._price())
        step = self.setting.total_steps
        self.switched.fill_(-(10**9))  # no dwell, no slew: the budget comes first
        self.at_budget = False
        stability = self._stability(torch.cat(masks))
        return self._answer(step, masks, False, reference, self._solve(step, masks, stability, reference))

    def _hold(
        self, step: int, masks: tuple[Tensor, ...], compact: bool, reference: Mapping[str, float]
    ) -> Decision:
        shrinks = self.control.shrink and (compact or self._pays(step, tuple(self._widths(masks))))
        return Decision(masks, shrinks, reference, self._price())

    def _price(self) -> dict[str, float]:
        return {k: s.price for k, s in self.prices.items()} | dict(self.setting.prices)

    def _stability(self, on: Tensor) -> float:
        """Mean rank correlation, inside groups, of Σ g² over two disjoint windows (active units)."""
        now, before = self.window
        found: list[float] = []
        for g in range(len(self.setting.structure.sizes)):
            i = (self.group == g) & on
            if i.sum() > 3 and now[i].any() and before[i].any():
                found.append(_spearman(now[i], before[i]))
        self.window = torch.stack([torch.zeros_like(now), now])
        return max(0.0, float(np.mean(found))) if found else 0.0

    def _reference(self, step: int, stability: float) -> dict[str, float]:
        """The plan's position between dense and budget, in stages, as a fraction per resource."""
        self.plan = self.control.plan.update(
            self.plan, step / self.setting.total_steps, self.trend, stability
        )
        stage = 1.0 / self.control.stages
        position = np.ceil(self.plan.level / stage - 1e-9) * stage
        self.at_budget = self.level == 0.0
        self.level = min(self.level, float(position))
        return {k: r + (1.0 - r) * self.level for k, r in self.setting.budget.items()}

    def _trusted(
        self, step: int, masks: tuple[Tensor, ...], trust: float, uniform_widths: tuple[int, ...]
    ) -> tuple[np.ndarray, ...]:
        """ṽ per group: values, with the uniform prior as far as they are not trusted."""
        v = self.gates.values(self.statistics(step, torch.cat(masks))).double()
        values = [x.numpy() for x in torch.split(v, list(self.setting.structure.sizes))]
        if not uniform_widths:
            return tuple(values)
        costs = [self.setting.costs[k] for k in self.setting.budget]
        shares = 1.0 / np.array([self.setting.dense[k] for k in self.setting.budget])
        prior = prior_values(uniform_widths, costs, self.setting.structure.sizes, shares)
        ordered = [np.sort(x)[::-1] for x in values]
        at = [n - 1 for n in uniform_widths]
        scale = np.mean([x[i] for x, i in zip(ordered, at, strict=True)])
        scale /= np.mean([p[i] for p, i in zip(prior, at, strict=True)])
        mixed: list[np.ndarray] = []
        for x, top, p in zip(values, ordered, prior, strict=True):
            out = np.empty_like(x)
            out[np.argsort(-x, kind="stable")] = trust * top + (1.0 - trust) * scale * p
            mixed.append(out)
        return tuple(mixed)

    def _uniform(self, reference: Mapping[str, float]) -> tuple[int, ...]:
        """n̄ at the reference; empty where nothing is to be met."""
        if not reference:
            return ()
        costs = [self.setting.costs[k] for k in reference]
        limits = np.array([r * self.setting.dense[k] for k, r in reference.items()])
        return uniform(self.setting.structure.sizes, costs, limits, self.setting.floors, self.setting.steps)

    def _solve(
        self, step: int, masks: tuple[Tensor, ...], stability: float, reference: Mapping[str, float]
    ) -> Solution:
        setting, control = self.setting, self.control
        names = tuple(setting.costs)
        dense = np.array([setting.dense[k] for k in names])
        steering = control.invert and not setting.prices
        trust = control.trust * stability
        even = self._uniform(reference)
        values = self._trusted(step, masks, trust, even)
        price = np.array([0.0 if steering else self._price()[k] for k in names]) / dense
        limits = np.array([reference.get(k, np.inf) if steering else np.inf for k in names]) * dense
        return solve(
            Problem(
                values=values,
                costs=tuple(setting.costs.values()),
                limits=limits,
                prices=price,
                floors=self._least(masks, trust, even),
                steps=setting.steps,
                masks=tuple(m.numpy() for m in masks),
                held=self._held(step, masks, values),
                hysteresis=control.hysteresis,
                resources=names,
            )
        )

    def _least(self, masks: tuple[Tensor, ...], trust: float, even: tuple[int, ...]) -> tuple[int, ...]:
        """Floors of this update: (1 − ρ) n̄, and at the budget no group loses more than `slew` at once."""
        floors = np.array(self.setting.floors)
        if even:
            steps = np.array(self.setting.steps)
            floors = np.maximum(floors, ((1.0 - trust) * np.array(even)).astype(int) // steps * steps)
            if self.at_budget:
                floors = np.maximum(floors, np.minimum(self._widths(masks) - self._slew(), even))
        return tuple(int(n) for n in floors)

    def _held(
        self, step: int, masks: tuple[Tensor, ...], values: tuple[np.ndarray, ...]
    ) -> tuple[np.ndarray, ...]:
        """Units that keep their state: the recently switched, and all dormant ones but the best `slew`."""
        young = (step - self.switched) < self.control.dwell * self.update_every
        held = [h.numpy().copy() for h in torch.split(young, list(self.setting.structure.sizes))]
        for g, most in enumerate(self._slew()):
            dormant = np.flatnonzero(~masks[g].numpy())
            held[g][dormant[np.argsort(-values[g][dormant], kind="stable")[most:]]] = True
        return tuple(held)

    def _slew(self) -> np.ndarray:
        """Most units of each group that may move at one update: an eighth, at least one width step."""
        return np.maximum(self.setting.steps, np.array(self.setting.structure.sizes) // 8)

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
        self.switched = torch.where(was != now, step, self.switched)
        news = bool((was & ~now).any())
        self._regulate(reference, solution)
        settled = self.watching or not news  # they have had their update under observation, or there are none
        shrinks = self.control.shrink and (compact or (settled and self._pays(step, solution.widths)))
        self.watching = news and not shrinks and not self.watching
        return Decision(masks, shrinks, reference, self._price())

    def _regulate(self, reference: Mapping[str, float], solution: Solution) -> None:
        for k, name in enumerate(self.setting.costs):
            dense = self.setting.dense[name]
            if name in reference:
                realised = float(solution.costs[k]) / dense
                tracked = float(solution.prices[k]) * dense if self.control.invert else None
                self.prices[name] = self.control.regulator.update(
                    self.prices[name], realised - reference[name], tracked
                )

    def _pays(self, step: int, widths: tuple[int, ...]) -> bool:
        """Time saved over the remaining steps against the copying of one shrink, both from counts."""
        setting = self.setting
        name = next(iter(setting.costs))
        saved = 1.0 - setting.fraction(name, widths)
        forward = setting.flops / FLOPS_PER_SECOND
        elements = sum(
            cost.value(np.array(setting.structure.sizes))
            for k, cost in setting.costs.items()
            if k == "params"
        )
        copying = 4 * 3 * 4 * (elements or setting.elements) / COPY_BYTES_PER_SECOND + 1e-3
        return saved * 3 * forward * (setting.total_steps - step) > copying

    # --- saved and restored ---------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "moments": self.moments,
            "window": self.window.clone(),
            "weights": self.weights.clone(),
            "switched": self.switched.clone(),
            "trend": self.trend,
            "gates": self.gates.state_dict(),
            "plan": self.plan,
            "prices": dict(self.prices),
            "random": self.random.get_state(),
            "batch": self.batch,
            "level": self.level,
            "at_budget": self.at_budget,
            "updates": self.updates,
            "watching": self.watching,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in (
            "moments",
            "window",
            "weights",
            "switched",
            "trend",
            "plan",
            "level",
            "batch",
            "at_budget",
            "updates",
            "watching",
        ):
            setattr(self, name, state[name])
        self.prices = dict(state["prices"])
        self.gates.load_state_dict(state["gates"])
        self.random.set_state(state["random"])


def _spacing(setting: Setting) -> int:
    """Observe as often as costs at most 1 % of a training step (≈ 3 forward passes), by counts.

    One observation reads weights and gradients of all readers once: about 16 FLOPs' time per element.
    """
    step = 3.0 * setting.flops
    share = 16.0 * setting.elements / max(step, 1.0)
    return int(min(50, max(1, setting.total_steps // 3000, np.ceil(share / 0.01))))


def _calibration_spacing(control: Control, update_every: int) -> int:
    """Updates between calibrations: one costs trials + 1 forward passes, a third of a training step each."""
    if not control.learned or control.trials == 0:
        return 0
    if control.calibrate_every is not None:
        return control.calibrate_every
    steps = (control.trials + 1) / 3.0 / CALIBRATION_SHARE
    return max(1, round(steps / update_every))


def _spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([x.argsort().argsort().float() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])
