"""The controller: pruning as a feedback loop.

At an update, in this order:

    observer           moments of the gate gradients           -> mean, curvature H      (saliency/moments.py)
    gate controller    statistics                              -> v_i                    (saliency/network.py)
    order              which unit of a group has which         -> v_i                    (saliency/order.py)
    worth              what units are worth as others go       -> ṽ_i                    (saliency/worth.py)
    planner            how far loss and values have settled    -> reference r(t)         (control/)
    solver             max Σ ṽ_i − λ·C(n),  C_k(n) ≤ r_k(t)    -> masks, shadow price λ  (allocate/)
    regulator          y − r                                   -> price λ_k(t)           (price/)

FLOPs and parameters are known exactly, so the solver inverts them exactly: the realised resource meets
the reference by construction, and the price is the shadow price of the reference. The PI regulator
tracks it (back-calculation: a bumpless start), and takes over where the price itself steers:
`Control(invert=False)`, the masks then answer the price alone until they freeze, when the solver has the
last word and the net the rest of the run to heal.

Which units stay, and how many of each group, is one question: those of most worth per cost over all groups
together, near uniform where nothing tells the units of a group apart (saliency/worth.py).

The cut is made in stages. The net shrinks at the first one after which the time saved over the steps that are
left outweighs the copying, and stays compact through the later ones. At the
budget the masks are revised now and then: width moves to where it is worth most, and units return. A unit
that is out of the tensors shows no gradient, so a revision begins with a look: the net is laid out masked
for the next `LOOK` steps of the user's training, every gate is observed at no extra forward, then it is
decided and shrunk again. How often is decided by what that costs (policies/feedback/pace.py); where peak
memory is under budget, never. From `freeze` on the masks hold.

`start` begins below dense: at the uniform allocation of that fraction ("budget": at the budget itself), a
random choice of units, compact from the first step. The run then never pays for the dense model, and is
the directly trained small net that may still move its width to where it turns out to be worth more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
from ...cost.problem import Problem
from ...price.pi import PI
from ...saliency.moments import LossTrend, track_loss
from ...saliency.network import GateController, Statistics, apportioned, first_guess
from ...saliency.order import ordered
from ...saliency.regrowth import regrowth
from ...saliency.worth import margin_price, weighed
from ...structure.groups import widths_of
from ..base import Decision, Observation, Policy, Wants
from ..rigl import cosine
from .pace import LOOK, look_spacing, observation_spacing, shrink_pays
from .pricing import Prices, Regulator
from .reference import Reference
from .units import UnitRecord, checked_values

__all__ = ["Control", "ControlLoop"]

EXCHANGED = 0.3  # of single weights, in the first revision: RigL's
WANTS = {(g, d): Wants(g, "return", d) for g in (False, True) for d in (False, True)}


@dataclass(frozen=True)
class Control(Policy):
    """Settings of the feedback policy. Steps are optimizer steps; `None` lets the horizon decide.

    `plan`: when the cut is made (`Plan`, or `Horizon`); `stages`: steps of the reference on its way down.
    `start`: fraction of dense to begin at, or "budget"; None: dense. `value`: of every unit, > 0; None: the
    second-order score; `learned`: the gate network over it. `observer`: of what is known only by measuring
    it. `update_every`, `observe_every`: steps between decisions, between observations. `revise_every`:
    updates between revisions of the masks at the budget, at least; 0: never. `looks`: share of the run's
    compute that looks at absent units may take; 0: none. `dwell`: updates that a switched unit keeps its
    state where a price decides. `hysteresis`: by how much a newcomer must be worth more than a unit that is
    on. `freeze`: fraction of the run after which masks hold. `shrink=False`: masks only. `invert=False`: the
    price steers and not the limit, set by `regulator`, "auto" or a `PI`.
    """

    plan: Plan | Horizon = field(default_factory=Plan)
    regulator: Regulator = "auto"
    observer: Observer = field(default_factory=Observer)
    invert: bool = True
    learned: bool = False
    value: Callable[[Statistics], Tensor] | None = None
    start: float | Literal["budget"] | None = None
    stages: int = 3
    update_every: int | None = None
    observe_every: int | None = None
    revise_every: int = 7
    looks: float = 0.01
    dwell: int = 3
    hysteresis: float = 0.3
    freeze: float = 0.75
    shrink: bool = True

    def __post_init__(self) -> None:
        for name in ("update_every", "observe_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value!r}: give a number of steps >= 1, or None")
        if not 0.0 <= self.freeze <= 1.0:
            raise ValueError(f"freeze={self.freeze!r}: give a number from 0 to 1")
        for name in ("revise_every", "looks", "dwell", "hysteresis"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"{name}={value!r}: give a number >= 0")
        if not (self.start in (None, "budget") or _is_fraction(self.start)):
            raise ValueError(f'start={self.start!r}: give a fraction of dense in (0, 1], "budget" or None')
        if self.stages < 1:
            raise ValueError(f"stages={self.stages!r}: give a number >= 1")
        if not (self.regulator == "auto" or isinstance(self.regulator, PI)):
            raise TypeError(f'regulator={self.regulator!r}: give "auto" or a PI(...)')

    def begin(self, problem: Problem) -> ControlLoop:
        if problem.totals and not self.shrink:
            raise ValueError(
                f"policy: Control(shrink=False) keeps the net dense, so {', '.join(problem.totals)} cannot "
                "fall; leave shrink=True"
            )
        return ControlLoop(self, problem)

    def decide(self, observation: Observation) -> Decision | None:
        raise TypeError("Control holds the settings; begin(problem) gives the policy at work")


class ControlLoop(Policy):
    """One run of `Control`: holds the states of its blocks and wires them, in the order above."""

    def __init__(self, control: Control, problem: Problem) -> None:
        self.control, self.problem = control, problem
        self.units = UnitRecord(problem, moves=control.learned, ranks=control.plan.heeds_values)
        self._set_pace()
        self.trend = LossTrend()
        self.gates = GateController(seed=problem.seed) if control.learned else None
        self.reference = Reference(control.plan, control.stages, control.observer, problem)
        self.prices = Prices(control.regulator, tuple(problem.costs))
        self.random = torch.Generator().manual_seed(problem.seed)
        self.updates = 0
        self.retargeted = False  # did the user change the budget?
        self.revised_at = 0  # the update of the last revision
        self.looks_until = 0  # the step that ends a look; 0: there is none
        self.rests = False  # then nothing need be observed

    def _set_pace(self) -> None:
        """Steps between updates and observations, and what observations reach back: by the horizon."""
        control, steps = self.control, self.problem.total_steps
        self._freeze_step = int(control.freeze * steps)
        self.update_every = control.update_every or min(200, max(1, steps // 60))
        self.observe_every = control.observe_every or observation_spacing(self.problem)
        self.units.set_pace(min(500.0, max(20.0, 0.05 * steps / self.observe_every)), self.update_every)

    def _first(self) -> Decision | None:
        """Where to begin: nothing to do (dense), or the uniform allocation at `start`, units at random."""
        start, budget = self.control.start, self.problem.budget
        if start is None or not (budget or (self.problem.totals and start != "budget")):
            return None  # a budget of run totals alone says nothing of a step: the plan meets it
        above = [] if start == "budget" else [(start - r) / (1.0 - r) for r in budget.values() if r < 1.0]
        self.reference.begin_at(max(0.0, *above, 0.0))
        asked = self.reference.asked(0.0)
        limits = self.reference.modelled(asked)
        if not limits and start != "budget":
            limits = dict.fromkeys(self.problem.costs, float(start))
        self.reference.solved(asked)
        masks = []
        for size, width in zip(
            self.problem.structure.sizes, uniform_under(self.problem, limits), strict=True
        ):
            mask = torch.zeros(size, dtype=torch.bool)
            mask[torch.randperm(size, generator=self.random)[:width]] = True
            masks.append(mask)
        return Decision(tuple(masks), self.control.shrink, asked, self._price(), "start")

    # --- what it needs, and what it sees --------------------------------------------------------

    def wants(self, step: int) -> Wants:
        regular = step % self.observe_every == 0 and not self._frozen(step) and not self.rests
        decides = step in (self._freeze_step, self.looks_until) or step % self.update_every == 0
        return WANTS[regular or self.looks_until > 0, decides]

    def _frozen(self, step: int) -> bool:
        return step > self._freeze_step

    def sees(self, observation: Observation) -> None:
        if math.isfinite(observation.loss):
            self.trend = track_loss(self.trend, observation.loss, self.problem.total_steps)
        if observation.gradients is not None:
            self.units.observe(observation.gradients)

    def statistics(self, seen: Observation) -> Statistics:
        assert seen.norms is not None
        known = self.units.statistics(
            self.problem, seen.step, torch.cat(seen.masks), seen.norms, self.trend.slope
        )
        return apportioned(known, None if seen.shares is None else seen.shares())

    def _values(self, known: Statistics) -> Tensor:
        if self.control.value is not None:
            return checked_values(self.control.value(known), known)
        if self.gates is None:
            values = first_guess(known)
        else:
            prices = self.prices.now().values()
            self.gates.learn(known, sum(prices) / max(1, len(prices)))
            values = self.gates.values(known)
        values = ordered(values, known)
        structure = self.problem.structure
        weights = [n for n, name in enumerate(structure.names) if name in structure.entries]
        return regrowth(values, known, weights, cosine(EXCHANGED, known.progress, self.control.freeze))

    def _until_revision(self, masks: tuple[Tensor, ...], *, compact: bool) -> float:
        """Steps until a revision of the masks at the budget is due, and worth what it costs; inf: never."""
        every, structure = self.control.revise_every, self.problem.structure
        if self.reference.level > 0.0 or every == 0 or not any(group.returns for group in structure.groups):
            return math.inf
        spacing = float(every * self.update_every)
        if compact:  # else what is dormant is in the tensors, and observed all the time
            fraction = self.problem.fraction(next(iter(self.problem.costs)), widths_of(masks))
            spacing = max(spacing, look_spacing(fraction, self.control.looks))
            spacing = math.inf if "memory" in self.problem.budget else spacing
        return spacing - (self.updates - self.revised_at) * self.update_every

    def _at_rest(self, step: int, masks: tuple[Tensor, ...], *, compact: bool) -> bool:
        """Will no unit move any more, whatever is observed?"""
        free = not self.control.invert or bool(self.problem.prices) or self.reference.feeds_back
        ahead = self._until_revision(masks, compact=compact)
        return self.reference.level == 0.0 and not free and step + ahead > self._freeze_step

    # --- the update -----------------------------------------------------------------------------

    def decide(self, observation: Observation) -> Decision | None:
        self.reference.heed(observation.measurements)
        if observation.final:
            return self._last(observation)
        if observation.step == 0:
            assert observation.norms is not None
            self.units.began(observation.norms)
            return self._first()
        step, masks, compact = observation.step, observation.masks, observation.compact
        if step < self.looks_until:
            return None
        looked, self.looks_until = self.looks_until > 0, 0
        self.updates += 1
        self.units.grow_older()
        progress = step / self.problem.total_steps
        stability = self.units.stability(torch.cat(masks))
        self.reference.advance(progress, self.trend, stability)
        asked = self.reference.asked(progress)
        limits = self.reference.modelled(asked)
        moved = self.reference.moved(asked, widths_of(masks))
        always = not self.control.invert or bool(self.problem.prices)
        if self._frozen(step) and not (moved and (self.reference.feeds_back or self.retargeted)):
            return self._hold(step, masks, compact or looked, asked)
        due = self._until_revision(masks, compact=compact) <= 0.0 and not self._frozen(step)
        revises = looked or due
        if revises and compact and not moved:
            return self._look(observation, asked)
        if not (revises or moved or always):
            return self._hold(step, masks, compact, asked)
        if revises:
            self.revised_at = self.updates
        steered = not self.control.invert and step < self._freeze_step
        exact = not (steered or self.problem.prices)
        solution = self._solve(observation, limits, exact=exact)
        self._regulate(asked, solution, exact=exact)
        self.reference.solved(asked)
        return self._answer(step, masks, compact or looked, asked, solution)

    def _look(self, seen: Observation, asked: Mapping[str, float]) -> Decision:
        """The same masks, with what is dormant in the tensors for the next few steps."""
        self.looks_until = seen.step + LOOK
        self.units.forget(~torch.cat(seen.masks))
        return Decision(seen.masks, False, asked, self._price(), "look")

    def _last(self, seen: Observation) -> Decision:
        """For `finalize`: the present masks if they meet the budget, else the budget enforced."""
        reference = dict(self.problem.budget)
        if self.reference.met(widths_of(seen.masks)):
            return Decision(seen.masks, True, reference, self._price())
        solution = self._solve(seen, self.reference.modelled(reference), exact=True)
        self._regulate(reference, solution, exact=True)
        return self._answer(self.problem.total_steps, seen.masks, False, reference, solution)

    # --- what is known of the use ---------------------------------------------------------------

    def realised(self, widths: tuple[int, ...]) -> dict[str, float]:
        return self.reference.realised(widths)

    def retarget(self, problem: Problem) -> None:
        """Another budget or horizon from here on; what is switched or frozen may move again."""
        self.problem = problem
        self._set_pace()
        self.retargeted, self.rests = True, False
        self.prices.cover(tuple(problem.costs))
        self.reference.retarget(problem)

    def describe(self) -> list[str]:
        return [*self.reference.describe(), *self.prices.describe()]

    def _hold(
        self, step: int, masks: tuple[Tensor, ...], compact: bool, reference: Mapping[str, float]
    ) -> Decision:
        shrinks = self.control.shrink and (compact or self._pays(step, widths_of(masks)))
        self.rests = self._at_rest(step, masks, compact=shrinks)
        return Decision(masks, shrinks, reference, self._price())

    def _price(self) -> dict[str, float]:
        return self.prices.now() | dict(self.problem.prices)

    def _solve(self, seen: Observation, limits: Mapping[str, float], *, exact: bool) -> Solution:
        """The trade-off under the modelled limits (`exact`), or under the price alone."""
        problem, control = self.problem, self.control
        known = self.statistics(seen)
        values = tuple(v.numpy() for v in self.units.split(self._values(known).double()))
        costs = [float(c.sum()) for c in self.units.split(known.cost)]
        worth = weighed(values, costs, self.units.plasticity(known.weight, known.on))
        if not exact:
            self.prices.follow(margin_price(problem, worth, uniform_under(problem, limits)))
        stand = Stand(
            masks=seen.masks,
            young=self.units.split(self.units.age < control.dwell),
            hysteresis=control.hysteresis,
        )
        return allocate(problem, worth, stand, limits if exact else {}, {} if exact else self._price())

    def _answer(
        self,
        step: int,
        before: tuple[Tensor, ...],
        compact: bool,
        reference: Mapping[str, float],
        solution: Solution,
    ) -> Decision:
        masks = tuple(torch.from_numpy(np.array(m)) for m in solution.masks)
        self.units.decided(torch.cat(before), torch.cat(masks))
        return self._hold(step, masks, compact, reference)

    def _regulate(self, asked: Mapping[str, float], solution: Solution, *, exact: bool) -> None:
        """The price of each resource: tracks the shadow price where a limit binds, or acts on y − r."""
        use = self.reference.realised(solution.widths)
        for k, name in enumerate(self.problem.costs):
            if name not in asked:
                continue
            shadow = float(solution.prices[k]) * self.problem.dense[name]
            if not exact:
                self.prices.regulate(name, use[name], asked[name])
            elif shadow > 0.0:
                self.prices.track(name, use[name], asked[name], shadow)

    def _pays(self, step: int, widths: Sequence[int]) -> bool:
        problem = self.problem
        fraction = problem.fraction(next(iter(problem.costs)), tuple(widths))
        return shrink_pays(problem, fraction, problem.total_steps - step)

    # --- saved and restored ---------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {name: getattr(self, name) for name in _PLAIN}
        return state | {
            "units": self.units.state_dict(),
            "trend": vars(self.trend) | {},
            "reference": self.reference.state_dict(),
            "prices": self.prices.state_dict(),
            "gates": None if self.gates is None else self.gates.state_dict(),
            "random": self.random.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in _PLAIN:
            setattr(self, name, state[name])
        self.units.load_state_dict(state["units"])
        self.trend = LossTrend(**state["trend"])
        self.reference.load_state_dict(state["reference"])
        self.prices.load_state_dict(state["prices"])
        if self.gates is not None:
            self.gates.load_state_dict(state["gates"])
        self.random.set_state(state["random"])


_PLAIN = ("retargeted", "updates", "revised_at", "looks_until", "rests")


def _is_fraction(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and 0.0 < value <= 1.0
