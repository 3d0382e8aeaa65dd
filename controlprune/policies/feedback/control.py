"""The controller: pruning as a feedback loop.

At an update, in this order:

    observer           moments of the gate gradients           -> mean, curvature H      (saliency/moments.py)
    gate controller    statistics                              -> v_i, calibrated        (saliency/network.py)
    trust              agreement of two disjoint windows       -> ρ ∈ [0, trust]
    planner            how far loss and values have settled    -> reference r(t)         (control/)
    solver             max Σ ṽ_i − λ·C(n),  C_k(n) ≤ r_k(t)    -> masks, shadow price λ  (allocate/)
    regulator          y − r                                   -> price λ_k(t)           (price/)

FLOPs and parameters are known exactly, so the solver inverts them exactly: the realised resource meets
the reference by construction, and the price is the shadow price of the reference. The PI regulator
tracks it (back-calculation: a bumpless start), and takes over where the price itself steers:
`Control(invert=False)`, the masks then answer the price alone until they freeze, when the solver has the
last word and the net the rest of the run to heal.

An early value is a noisy one: values are shrunk towards the uniform allocation as far as their ranking is
not stable, which units of a group stay is said by the norm of their readers (`keep`), and at the budget few
units move at a time (saliency/trust.py).

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
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...allocate.knapsack import Solution
from ...allocate.limits import Stand, allocate, uniform_under
from ...control.horizon import Horizon
from ...control.ramp import Plan
from ...control.scale import Observer
from ...price.lqr import LQR
from ...price.pi import PI
from ...saliency.moments import LossTrend, track_loss
from ...saliency.network import Experiment, GateController, Statistics
from ...saliency.trust import believed, by_norm
from ...structure.groups import widths_of
from ..base import Decision, Setting, Trial
from .pace import calibration_spacing, observation_spacing, shrink_pays
from .pricing import Prices, Regulator
from .reference import Reference
from .units import UnitRecord

__all__ = ["Control", "ControlLoop"]


@dataclass(frozen=True)
class Control:
    """Settings of the feedback policy. Steps are optimizer steps; `None` lets the horizon decide."""

    plan: Plan | Horizon = field(
        default_factory=lambda: Plan(earliest=0.1, latest=0.15, duration=0.3, deadline=0.5)
    )
    regulator: Regulator = "auto"  # of the price; see policies/feedback/pricing.py
    observer: Observer = field(default_factory=Observer)  # of what is known only by measuring it
    invert: bool = True
    learned: bool = True  # False: the second-order score without the gate network
    trust: float = 0.5  # most weight that values get against the uniform allocation
    keep: Literal["norm", "value"] = "norm"  # which units of a group stay; see saliency/trust.py
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
        if self.keep not in ("norm", "value"):
            raise ValueError(f'keep={self.keep!r}: give "norm" or "value"')
        if self.stages < 1:
            raise ValueError(f"stages={self.stages!r}: give a number >= 1")
        if not (self.regulator == "auto" or isinstance(self.regulator, PI | LQR)):
            raise TypeError(f'regulator={self.regulator!r}: give "auto", a PI(...) or an LQR(...)')

    def begin(self, setting: Setting) -> ControlLoop:
        if setting.totals and not self.shrink:
            raise ValueError(
                f"policy: Control(shrink=False) keeps the net dense, so {', '.join(setting.totals)} cannot "
                "fall; leave shrink=True"
            )
        return ControlLoop(self, setting)


class ControlLoop:
    """One run of `Control`: holds the states of its blocks and wires them, in the order above."""

    def __init__(self, control: Control, setting: Setting) -> None:
        self.control, self.setting = control, setting
        self.update_every = control.update_every or min(200, max(1, setting.total_steps // 60))
        self.observe_every = control.observe_every or observation_spacing(setting)
        self.calibrate_every = _calibrate_every(control, setting, self.update_every)
        memory = min(500.0, max(20.0, 0.05 * setting.total_steps / self.observe_every))
        self.units = UnitRecord(setting, memory, self.update_every)
        self.trend = LossTrend()
        self.gates = GateController(seed=setting.seed)
        self.reference = Reference(control.plan, control.stages, control.observer, setting)
        self.prices = Prices(control.regulator, tuple(setting.costs))
        self.random = torch.Generator().manual_seed(setting.seed)
        self.updates = 0
        self.retargeted = False  # did the user change the budget?
        self.watching = False  # units switched off at the last update are still in the tensors

    def first(self) -> Decision | None:
        """Where to begin: nothing to do (dense), or the uniform allocation at `start`, units at random."""
        start, budget = self.control.start, self.setting.budget
        if start is None or not (budget or self.setting.totals):
            return None
        above = [] if start == "budget" else [(start - r) / (1.0 - r) for r in budget.values() if r < 1.0]
        self.reference.begin_at(max(0.0, *above, 0.0))
        asked = self.reference.asked(0.0)
        limits = self.reference.modelled(asked)
        self.reference.solved(asked)
        masks = []
        for size, width in zip(
            self.setting.structure.sizes, uniform_under(self.setting, limits), strict=True
        ):
            mask = torch.zeros(size, dtype=torch.bool)
            mask[torch.randperm(size, generator=self.random)[:width]] = True
            masks.append(mask)
        return Decision(tuple(masks), self.control.shrink, asked, self._price(), "start")

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
        return self.reference.level == 0.0 and every > 0 and (self.updates + 1) % every == 0

    def wants_probe(self, step: int, compact: bool) -> bool:
        return compact and self._revises() and not self._frozen(step)

    @property
    def _freeze_step(self) -> int:
        return int(self.control.freeze * self.setting.total_steps)

    def _frozen(self, step: int) -> bool:
        return step > self._freeze_step

    # --- observer -------------------------------------------------------------------------------

    def see_batch(self, examples: int) -> None:
        """How many examples a mini-batch of the training holds."""
        self.units.batch = max(1, examples)

    def observe(self, gradients: Tensor, weights: Tensor) -> None:
        self.units.observe(gradients, weights)

    def watch(self, step: int, loss: float) -> None:
        self.trend = track_loss(self.trend, loss, self.setting.total_steps)

    def statistics(self, step: int, on: Tensor) -> Statistics:
        return self.units.statistics(self.setting, step, on, self.trend.slope)

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
        prices = self.prices.now().values()
        self.gates.learn(s, sum(prices) / max(1, len(prices)), rounds=8)

    # --- the update -----------------------------------------------------------------------------

    def decide(self, step: int, masks: tuple[Tensor, ...], compact: bool) -> Decision:
        revises = self._revises()
        self.updates += 1
        self.units.grow_older()
        progress = step / self.setting.total_steps
        stability = self.units.stability(torch.cat(masks))
        self.reference.advance(progress, self.trend, stability)
        asked = self.reference.asked(progress)
        limits = self.reference.modelled(asked)
        moved = self.reference.moved(asked, widths_of(masks))
        always = not self.control.invert or bool(self.setting.prices)
        if self._frozen(step) and not (moved and (self.reference.feeds_back or self.retargeted)):
            return self._hold(step, masks, compact, asked)
        if not (revises or self.watching or moved or always):
            return self._hold(step, masks, compact, asked)
        steered = not self.control.invert and step < self._freeze_step
        exact = not (steered or self.setting.prices)
        solution = self._solve(step, masks, stability, limits, exact=exact)
        self._regulate(asked, solution, exact=exact)
        self.reference.solved(asked)
        return self._answer(step, masks, compact, asked, solution)

    def last(self, masks: tuple[Tensor, ...]) -> Decision:
        """For `finalize`: the present masks if they meet the budget, else the budget enforced."""
        reference = dict(self.setting.budget)
        if self.reference.met(widths_of(masks)):
            return Decision(masks, True, reference, self._price())
        step = self.setting.total_steps
        self.units.let_go()  # no dwell, no slew: the budget comes first
        self.reference.at_budget = False
        stability = self.units.stability(torch.cat(masks))
        solution = self._solve(step, masks, stability, self.reference.modelled(reference), exact=True)
        self._regulate(reference, solution, exact=True)
        return self._answer(step, masks, False, reference, solution)

    # --- what is measured -----------------------------------------------------------------------

    def feel(self, resource: str, widths: tuple[int, ...], measured: float, spread: float) -> None:
        """The use measured at these widths, as a fraction of dense, and its relative error."""
        self.reference.feel(resource, self.setting.fraction(resource, widths), measured, spread)

    def account(self, resource: str, widths: tuple[int, ...], spent: float, limit: float) -> None:
        """What of a run total is spent so far and may be in all, as fractions of a dense run.

        `widths`: in the tensors now.
        """
        self.reference.account(resource, spent, limit, self.setting.fraction(resource, widths))

    def realised(self, widths: tuple[int, ...]) -> dict[str, float]:
        return self.reference.realised(widths)

    def retarget(self, setting: Setting) -> None:
        """Another budget from here on; what is switched or frozen may move again."""
        self.setting = setting
        self.retargeted = True
        self.prices.cover(tuple(setting.costs))
        self.reference.retarget(setting)

    def describe(self) -> list[str]:
        return [*self.reference.describe(), *self.prices.describe()]

    def _hold(
        self, step: int, masks: tuple[Tensor, ...], compact: bool, reference: Mapping[str, float]
    ) -> Decision:
        shrinks = self.control.shrink and (compact or self._pays(step, widths_of(masks)))
        self.units.norms = None
        return Decision(masks, shrinks, reference, self._price())

    def _price(self) -> dict[str, float]:
        return self.prices.now() | dict(self.setting.prices)

    def _solve(
        self,
        step: int,
        masks: tuple[Tensor, ...],
        stability: float,
        limits: Mapping[str, float],
        *,
        exact: bool,
    ) -> Solution:
        """The trade-off under the modelled limits (`exact`), or under the price alone."""
        setting, control = self.setting, self.control
        trust = control.trust * stability
        even = uniform_under(setting, limits)
        known = self.statistics(step, torch.cat(masks))
        v = self.gates.values(known)
        if control.keep == "norm" and exact:
            v = by_norm(v, known.weight, known.group, known.on)
        values, scale = believed(setting, v, trust, even)
        if not exact:
            self.prices.follow(scale)
        stand = Stand(
            masks=masks,
            young=self.units.split(self.units.age < control.dwell),
            trust=trust,
            at_budget=self.reference.at_budget,
            hysteresis=control.hysteresis,
        )
        return allocate(setting, values, even, stand, limits if exact else {}, {} if exact else self._price())

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
        self.units.decided(was, now)
        news = bool((was & ~now).any())
        settled = self.watching or not news  # they have had their update under observation, or there are none
        shrinks = self.control.shrink and (compact or (settled and self._pays(step, solution.widths)))
        self.watching = news and not shrinks and not self.watching
        return Decision(masks, shrinks, reference, self._price())

    def _regulate(self, asked: Mapping[str, float], solution: Solution, *, exact: bool) -> None:
        """The price of each resource: tracks the shadow price where a limit binds, or acts on y − r."""
        use = self.reference.realised(solution.widths)
        for k, name in enumerate(self.setting.costs):
            if name not in asked:
                continue
            shadow = float(solution.prices[k]) * self.setting.dense[name]
            if not exact:
                self.prices.regulate(name, use[name], asked[name])
            elif shadow > 0.0:
                self.prices.track(name, use[name], asked[name], shadow)

    def _pays(self, step: int, widths: Sequence[int]) -> bool:
        setting = self.setting
        fraction = setting.fraction(next(iter(setting.costs)), tuple(widths))
        return shrink_pays(setting, fraction, setting.total_steps - step)

    # --- saved and restored ---------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {name: getattr(self, name) for name in _PLAIN}
        return state | {
            "units": self.units.state_dict(),
            "trend": vars(self.trend) | {},
            "reference": self.reference.state_dict(),
            "prices": self.prices.state_dict(),
            "gates": self.gates.state_dict(),
            "random": self.random.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in _PLAIN:
            setattr(self, name, state[name])
        self.units.load_state_dict(state["units"])
        self.trend = LossTrend(**state["trend"])
        self.reference.load_state_dict(state["reference"])
        self.prices.load_state_dict(state["prices"])
        self.gates.load_state_dict(state["gates"])
        self.random.set_state(state["random"])


_PLAIN = ("retargeted", "updates", "watching")


def _is_fraction(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and 0.0 < value <= 1.0


def _calibrate_every(control: Control, setting: Setting, update_every: int) -> int:
    if not control.learned or control.trials == 0:
        return 0
    if control.calibrate_every is not None:
        return control.calibrate_every
    return calibration_spacing(setting, control.trials, update_every)
