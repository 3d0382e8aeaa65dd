"""The run: every block has its own file, here they meet. `Controller` is what a user holds of it.

    optimizer.step()   -> step hook: gate gradients are read before the optimizer runs
    controller.step(L) -> observer, planner, solver, regulator -> masks -> plant

A step that the optimizer skipped (AMP), or whose loss or gradients are not finite, is not observed, and
counted. Among replicas (loop/replicas.py) the steps between two updates are read together at the update, so
that every rank decides alike. Nothing here runs the user's model: what is observed is what training computes.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..budget import Budget, Price
from ..cost.measurement import Measurement
from ..cost.problem import Problem
from ..granularity.base import Granularity
from ..plant.base import BasePlant
from ..plant.hooks import Link
from ..plant.interrupts import uninterrupted
from ..plant.joint import members, stepped
from ..plant.layout import Changed
from ..policies.base import Decision, Observation, Policy, Wants
from ..state.checkpoint import Checkpoints
from ..structure.groups import widths_of
from ..structure.saying import warn
from ..structure.surroundings import plainly
from .cadence import Strangers
from .ends import abandon, apply_to_all, attached
from .history import Record, history_of
from .intake import Intake, when_closed
from .metering import AGAIN, Metering
from .recompile import Layouts, compilations, progress
from .replicas import Replicas, digest
from .telling import News, tell_attached
from .terms import Terms

__all__ = ["Run"]


class Run:
    """One model under control: its plant, its policy at work, and what has been observed so far."""

    def __init__(
        self,
        plant: BasePlant,
        optimizer: Optimizer | None,
        terms: Terms,
        policy: Policy,
        replicas: Replicas,
        metering: Metering,
        granularity: Granularity,
    ) -> None:
        problem = terms.problem
        self.plant, self.terms, self.given, self.granularity = plant, terms, policy, granularity
        self.replicas, self.metering = replicas, metering
        self.policy = policy.begin(problem)
        self.checkpoints = Checkpoints(self.plant, optimizer, Link(self, Run.relayout))
        self._hooks = [o.register_step_pre_hook(Link(self, Run.before_step)) for o in stepped(optimizer)]
        self.followers: list[BasePlant] = []
        self.awaited: list[Any] = []  # states of followers that were saved and are not there yet
        self.layouts = Layouts({problem.structure.sizes: 0.0})
        self._compiled_before = compilations()
        self.history = history_of(problem)
        self.steps = 0
        self.intake = Intake(self.plant)
        self._strangers = Strangers(members(optimizer), [*self.plant.tensors().values()])
        self.postponed = False  # an update that was due, and there was nothing new to decide on
        self.loss = math.nan  # of the last step that had a finite one
        self.measurements: list[Measurement] = []  # since the last decision
        self.measured_at = 0  # the step at which the layout was last measured
        self.overhead = 0.0  # seconds of process CPU time in the controller
        self.began = time.process_time()
        self.event = ""
        self.live = True
        self.listeners: list[Callable[[Any], object]] = [News()]  # told of every update
        self._blind = False  # could gradients not be read?
        self._stuck = False  # can the masks not be changed any more?
        self._end = weakref.finalize(
            self, abandon, self.plant, self.followers, [*self._hooks, self._strangers, self.checkpoints]
        )
        self._end.atexit = False
        attached[plant.model] = weakref.ref(self)
        tell_attached(problem)
        self._meet_shards()
        self._begin()
        self.expect()

    def _meet_shards(self) -> None:
        """Ranks that hold a part of the parameters each decide together."""
        if self.plant.group is None:
            return
        self.layouts.compiled |= not self.plant.shrinks  # its shapes never change
        self.replicas.join(self.plant.group, next(iter(self.plant.tensors().values())).device)
        self.replicas.mean([], self.fingerprint())
        if not self.replicas.agree:
            raise ValueError(
                "attach: its arguments differ between ranks; give the same, and one seed, on all"
            )

    def _begin(self) -> None:
        """Below dense, where the policy starts there."""
        before = self.plant.masks
        decision = self.decide(self.observation())
        if decision is not None:
            self.relayout(decision.masks, decision.compact)
            self.write(decision, before, False)

    @property
    def problem(self) -> Problem:
        return self.terms.problem

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the tensors."""
        return self.plant.widths

    def fingerprint(self) -> list[int]:
        """Of all that decides: it is the same on every rank."""
        if self.replicas.alone:
            return []
        plant = self.plant
        found = [list(plant.masks), plant.compact, list(plant.mark), self.policy.state_dict()]
        return digest([self.steps, self.terms.survey.mark, *found])

    # --- between two updates --------------------------------------------------------------------

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """The optimizer is called: it is observed when it has its gradients."""
        if len(args) == 1 and not kwargs:  # no closure
            return self._see(optimizer, None)
        return when_closed(args, kwargs, lambda returned: self._see(optimizer, returned))

    def _see(self, optimizer: Optimizer | None, returned: object) -> None:
        """Are there gradients, and are they to be read?"""
        if self.checkpoints.waiting:
            self.checkpoints.require_admitted()
        gradients = self.intake.ran(optimizer, returned)
        awaited = self.wants.gradients or self.intake.owed
        if gradients and awaited and not self._blind and not self._stuck:
            self._observe(optimizer)

    @uninterrupted
    @plainly
    def _observe(self, optimizer: Optimizer | None) -> None:
        """What do the gates see?"""
        started = time.process_time()
        self.metering.enter()
        try:
            self.intake.observe(optimizer)
        except Changed as error:
            self._hold_still(error)
        except Exception as error:  # what can't be observed here is given up, and the training goes on
            self._blind = True
            warn(
                f"controlprune: gate gradients cannot be read here ({type(error).__name__}: {error}); "
                "from here on units are ranked without them",
            )
        self.metering.leave()
        self.overhead += time.process_time() - started

    def step(self, loss: Tensor | float | None) -> None:
        """A training step with this loss is done."""
        if self.plant.optimizer is None:
            self._see(None, None)
        began = time.perf_counter()
        if self._passed(loss):  # to ask for CPU time would take a tenth of it
            self.overhead += time.perf_counter() - began
        else:
            started = time.process_time()
            self._step(loss)
            self.overhead += time.process_time() - started

    def _passed(self, loss: Tensor | float | None) -> bool:
        """Was this one of the many steps of which nothing is wanted? Then it is counted, and no more."""
        if not self._calm or self.postponed or self.plant.rests or not self.intake.passed(loss):
            return False
        self.steps += 1
        self.metering.passed()
        coming = self.policy.wants(self.steps + 1)
        if coming is not self.wants:
            self._prepare(coming)
        return True

    @plainly
    def _step(self, loss: Tensor | float | None) -> None:
        self.metering.enter()
        self.plant.rest()
        try:
            full = self.intake.after_step(loss, wanted=self.wants.gradients)
            self.steps += 1
            self.metering.step()
            if trouble := self.intake.cadence.trouble(self.problem.total_steps):
                warn(f"controlprune: nothing is controlled: {trouble}")
            if full or self.due:
                self._catch_up()
        finally:
            self.expect()
        self.metering.leave()

    @uninterrupted
    def _catch_up(self) -> None:
        """Read what waits, and update where one is due. Most steps are only counted."""
        if self.due and self.intake.idle and self.replicas.alone:
            self.postponed = True
        elif self.due:
            self._update()
        elif self.replicas.alone:
            self.read()

    def expect(self) -> None:
        """What the policy wants of the step that comes: asked once, and whenever it may have changed."""
        self._prepare(self.policy.wants(self.steps + 1))

    def _prepare(self, wants: Wants) -> None:
        self.wants = wants
        self._calm = not (wants.gradients or wants.decision or self.metering.timed)
        awaited = wants.gradients or self.intake.owed or not self.intake.cadence.even
        self.plant.expect(wants.kind if awaited else None)
        if wants.gradients or wants.decision:
            self.replicas.watch_for_ddp(self.plant.model)

    @property
    def due(self) -> bool:
        """Is a decision wanted of the step that is over?"""
        wanted = self.postponed or self.wants.decision
        return wanted and self.steps <= self.problem.total_steps and not self._stuck

    @plainly
    def read(self) -> None:
        """Hand the steps since the last reading to the policy."""
        own, ran, rows = self.intake.unread()
        losses, ran = self.replicas.mean([own, ran], self.fingerprint())
        for step in self.intake.accept(own, losses, ran, rows):
            if math.isfinite(step.loss):
                self.loss = step.loss
            if step.good:
                self.policy.sees(Observation(self.steps, step.loss, step.row))

    # --- an update ------------------------------------------------------------------------------

    def observation(self, *, final: bool = False) -> Observation:
        """What is known now; what was measured counts once."""
        measurements, self.measurements = tuple(self.measurements), []
        return Observation(
            step=self.steps,
            loss=self.loss,
            weigh=lambda: torch.cat(self.plant.weight_norms()).cpu(),
            shares=self.plant.shares,
            masks=self.plant.masks,
            compact=self.plant.compact,
            measurements=measurements,
            final=final,
        )

    def decide(self, seen: Observation) -> Decision | None:
        """The policy's answer, as it can be laid down."""
        decision = self.policy.decide(seen)
        return None if decision is None else replace(decision, masks=self.plant.project(decision.masks))

    def _update(self) -> None:
        self.layouts.compiled |= compilations() > self._compiled_before
        self.read()
        if not self.replicas.agree:
            self.replicas.repair()
        self.postponed = self.replicas.present < self.replicas.size or not self.intake.fresh
        if self.postponed:
            return
        plant = self.plant
        if not self._done(plant.recheck):
            return
        self.measurements += self.metering.read(self.problem, self.widths)
        if self.steps - self.measured_at >= AGAIN:
            self.measure()
        before, was_compact = plant.masks, plant.compact
        decision = self.decide(self.observation())
        if decision is None:
            return
        left = self.problem.total_steps - self.steps
        layout = self.layouts.choose(
            self.problem,
            decision.masks,
            compact=(decision.compact or not plant.parks) and plant.shrinks,
            then=plant.widths_at(decision.masks, decision.compact and plant.shrinks),
            held=self.widths,
            left=left,
        )
        if layout is not None and not self._done(lambda: self.relayout(decision.masks, layout)):
            return
        self.write(decision, before, was_compact)

    def _done(self, change: Callable[[], object]) -> bool:
        """Is it? Where others changed model or optimizer, it cannot be."""
        try:
            change()
        except (RuntimeError, ValueError) as error:
            self._hold_still(error)
        return not self._stuck

    def _hold_still(self, error: Exception) -> None:
        self._stuck = True
        step = self.steps + 1
        warn(f"controlprune: from step {step} on nothing is controlled, the masks hold: {error}")

    @uninterrupted
    @plainly
    def relayout(self, masks: Sequence[Tensor], compact: bool) -> None:
        """The one way to other masks or the other layout."""
        compact = (
            (compact or not self.plant.parks) and self.plant.shrinks and not all(bool(m.all()) for m in masks)
        )
        same = all(torch.equal(a, b) for a, b in zip(masks, self.plant.masks, strict=True))
        if not same or compact != self.plant.compact:
            shapes, held = self.shapes, self.widths
            self.checkpoints.set_aside()
            try:
                apply_to_all((self.plant, *self.followers), masks, compact=compact)
            finally:
                self.checkpoints.admit()
            if shapes != self.shapes:
                self.replicas.reshaped()
            self.layouts.take(self.widths, progress(self.problem, widths_of(masks)))
            if held != self.widths:
                self.measure()

    @property
    def shapes(self) -> list[torch.Size]:
        return [p.shape for p in self.plant.model.parameters()]

    def measure(self) -> None:
        """What the layout really takes. A masked net runs dense: nothing to see."""
        self.measured_at = self.steps
        model = self.plant.model if self.plant.compact else None
        self.measurements += self.metering.laid_out(self.widths, model)

    def write(self, decision: Decision, before: tuple[Tensor, ...], was_compact: bool) -> None:
        """The row of this update in the history."""
        plant = self.plant
        active, held = widths_of(plant.masks), self.widths
        same = before is plant.masks
        previous = held if same and was_compact == plant.compact else plant.widths_at(before, was_compact)
        off = on = (0,) * len(active)
        if not same:
            off = widths_of(a & ~b for a, b in zip(before, plant.masks, strict=True))
            on = widths_of(b & ~a for a, b in zip(before, plant.masks, strict=True))
        change = "shrink" if sum(held) < sum(previous) else "expand" if sum(held) > sum(previous) else ""
        self.history.append(
            Record(
                step=self.steps,
                loss=self.loss,
                active=active,
                widths=tuple(held),
                price=dict(decision.price),
                reference=dict(decision.reference),
                realised=dict(self.policy.realised(active)),
                off=off,
                on=on,
                bounds=dict(plant.error_bounds),
                event=",".join(k for k in (self.event, decision.event, change) if k),
                seconds=time.process_time() - self.began,
                overhead_seconds=self.overhead,
            )
        )
        self.event = ""
        for listener in list(self.listeners):
            listener(self)

    @plainly
    def retarget(self, budget: Budget | Price, total_steps: int) -> None:
        """Another budget or horizon from here on."""
        terms = replace(self.terms, budget=budget, total_steps=total_steps)
        self.given.begin(terms.problem)  # an error if the policy cannot
        self.metering.retarget(terms)
        self.event = "budget" if budget is not self.terms.budget else "horizon"
        self.terms = terms
        self.policy.retarget(terms.problem)
        self.history.total_steps = total_steps
        self.expect()

    def close(self, *, small: bool = False) -> None:
        """Nothing of ours is left on model and optimizer."""
        self.live = False
        self._end.detach()
        for hook in self._hooks:
            hook.remove()
        self._strangers.remove()
        self.replicas.close()
        self.checkpoints.remove(small=small)
        attached.pop(self.plant.model, None)
