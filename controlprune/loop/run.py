"""The loop's wiring: every block has its own file, here they meet. `Controller` is what a user holds of it.

    optimizer.step()   -> step hook: gate gradients are read before the optimizer runs
    controller.step(L) -> observer, gate controller, planner, solver, regulator -> masks -> plant

A step that the optimizer skipped (AMP), or whose loss or gradients are not finite, is not observed, and
counted. Among replicas (loop/replicas.py) the steps between two updates are read together at the update, so
that every rank decides alike.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..budget import Budget, Price
from ..cost.forward_time import Gauge
from ..cost.instruments import Instruments
from ..cost.survey import Survey
from ..plant.hooks import Link
from ..plant.interrupts import uninterrupted
from ..plant.joint import members, stepped
from ..plant.plant import Plant
from ..policies.base import Decision, Policy, Setting
from ..saliency.experiments import ablations, absent_gradients
from ..saliency.last_batch import Batch, Recorder
from ..state.checkpoint import Checkpoints
from ..structure.groups import Structure, widths_of
from ..structure.record import batch_size
from .cadence import Strangers
from .history import History, Record
from .intake import Intake, when_closed
from .metering import AGAIN, Metering
from .recompile import Layouts, progress
from .replicas import Replicas, digest, is_sharded, unwrapped

__all__ = ["Wiring", "attached", "new_history", "require_unattached"]

log = logging.getLogger("controlprune")

attached: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Wiring]] = weakref.WeakKeyDictionary()


def require_unattached(model: nn.Module) -> None:
    """RuntimeError if a controller is at work on this model."""
    reference = attached.get(model)
    if reference is not None and reference() is not None:
        raise RuntimeError("model: a controller is attached to it; call its finalize() or detach() first")


class Wiring(ABC):
    """A running loop, without its public face: what happens before an optimizer step and at an update."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        budget: Budget | Price,
        survey: Survey,
        settle: Callable[[Budget | Price, Survey], Setting],
        policy: Policy,
        instruments: Instruments,
        gauge: Gauge | None = None,
        park_on: torch.device | None = None,
    ) -> None:
        self._budget, self._survey, self._settle, self._policy = budget, survey, settle, policy
        setting = self._setting = settle(budget, survey)
        self._plant = _plant(model, optimizer, setting.structure, park_on)
        self._loop = policy.begin(setting)
        self._recorder = Recorder(model)
        self._checkpoints = Checkpoints(self._plant, optimizer, self._relayout)
        self._hooks = [o.register_step_pre_hook(Link(self, Wiring._observe)) for o in stepped(optimizer)]
        self._followers: list[Plant] = []
        self._layouts = Layouts({setting.structure.sizes: 0.0})
        structure = setting.structure
        self._replicas = Replicas()
        self._metering = Metering(setting, budget, instruments, gauge, self._replicas.mean_known)
        self.history = new_history(setting)
        self.steps = 0
        self._intake = Intake(self._plant)
        self._strangers = Strangers(members(optimizer), [*self._plant.tensors().values()])
        self._postponed = False  # an update that was due, and there was nothing new to decide on
        self._loss = self._own_loss = math.nan
        self._overhead = 0.0
        self._gauged_at = 0  # the step at which the layout was last measured
        self._began = time.process_time()
        self._event = ""
        self._live = True
        attached[model] = weakref.ref(self)
        if structure.refused:
            log.info("%d index spaces are left alone; see controller.report()", len(structure.refused))
        self._meet_shards()
        self._begin()
        self._replicas.watch_for_ddp(model, self.replicate)
        self._arm()

    def _meet_shards(self) -> None:
        """Ranks that hold a part of the parameters each decide together, and look at no batch twice."""
        if self._plant.group is None:
            return
        self._layouts.looked = self._layouts.compiled = True
        self._replicas.join(self._plant.group, next(iter(self._plant.tensors().values())).device)
        self._replicas.mean([], self._fingerprint)
        if not self._replicas.agree:
            raise ValueError(
                "attach: its arguments differ between ranks; give the same, and one seed, on all"
            )

    def _begin(self) -> None:
        """Below dense, where the policy starts there."""
        decision = self._loop.first()
        if decision is not None:
            before = self._plant.masks
            self._relayout(decision.masks, decision.compact)
            self._write(decision, before, False)

    @property
    def plant(self) -> Plant:
        """The model and optimizer as they are laid out now."""
        return self._plant

    @property
    def model(self) -> nn.Module:
        return self._plant.model

    @abstractmethod
    def state_dict(self) -> dict[str, Any]: ...

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    # --- between two updates --------------------------------------------------------------------

    def _observe(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """The optimizer is called: it is observed when it has its gradients."""
        return when_closed(args, kwargs, lambda returned: self._see(optimizer, returned))

    def _see(self, optimizer: Optimizer | None, returned: object) -> None:
        """Are there gradients, and what do the gates see?"""
        started = time.process_time()
        self._metering.enter()
        self._checkpoints.require_admitted()
        read = self._loop.wants_gradients(self.steps + 1) or self._recorder.batch is not None
        self._intake.before_step(optimizer, returned, read=read)
        self._metering.leave()
        self._overhead += time.process_time() - started

    @property
    def _due(self) -> bool:
        wanted = self._postponed or self._loop.wants_decision(self.steps)
        return wanted and self.steps <= self._setting.total_steps

    def _read(self, batch: Batch | None = None) -> tuple[Tensor | None, int]:
        """Hand the steps since the last reading to the loop.

        The last one's row if it was good, and how many examples all replicas' batches hold (0: one has none).
        """
        own, ran, rows = self._intake.unread()
        examples = 0 if batch is None else batch_size((batch.args, batch.kwargs))
        seen = torch.tensor([examples, float(examples > 0)])
        losses, ran, seen = self._replicas.mean([own, ran, seen], self._fingerprint)
        row = None
        for step in self._intake.accept(own, losses, ran, rows):
            if math.isfinite(step.loss):
                self._loss, self._own_loss = step.loss, step.own
                self._loop.watch(self.steps, step.loss)
            if step.good and step.row is not None:
                self._loop.observe(step.row, torch.full_like(step.row, math.nan))
            row = step.row if step.good else None
        return row, round(float(seen[0]) * self._replicas.present) if float(seen[1]) == 1.0 else 0

    def _arm(self) -> None:
        """Record the next step's batch where the loop wants it; once at least, to tell a compiled model."""
        step, last = self.steps + 1, self._setting.total_steps
        looks = not self._layouts.looked and self._loop.wants_decision(step)
        if 1 < step <= last and not self._layouts.compiled and (looks or self._loop.wants_batch(step)):
            self._layouts.looked = True
            self._recorder.arm()

    # --- an update ------------------------------------------------------------------------------

    def _update(self) -> None:
        if self._recorder.armed:
            self._layouts.compiled = True
            self._recorder.disarm()
        batch = self._recorder.take()
        if batch is not None and not any(g is not None for g in batch.gradients):
            batch = None
        row, examples = self._read(batch)
        if not self._replicas.agree:
            self._repair()
            examples = 0
        self._postponed = self._replicas.present < self._replicas.size or not self._intake.fresh
        if self._postponed:
            return
        plant = self._plant
        self._settle_accounts()
        if self.steps - self._gauged_at >= AGAIN:
            self._measure()
        self._weigh()
        if batch is not None and examples:
            self._loop.see_batch(examples)
            self._calibrate(batch, row)
        before, was_compact = plant.masks, plant.compact
        decision = self._loop.decide(self.steps, plant.masks, plant.compact)
        layout = self._layouts.choose(
            self._setting,
            decision.masks,
            compact=decision.compact,
            held=self._held,
            left=self._setting.total_steps - self.steps,
        )
        if layout is not None:
            self._relayout(decision.masks, layout)
        self._write(decision, before, was_compact)

    def _weigh(self) -> None:
        """Norms are read where something is to be decided, and not kept."""
        weights = torch.cat(self._plant.weight_norms()).cpu()
        self._loop.observe(torch.full_like(weights, math.nan), weights)

    def _calibrate(self, batch: Batch, row: Tensor | None) -> None:
        """Paired ablations and probes on the recorded batch, as far as the loop asks for them."""
        plant, total = self._plant, self._replicas.total
        trials = self._loop.trials(self.steps, plant.masks, plant.compact)
        if trials:
            outcomes = ablations(plant, batch, self._own_loss, trials, row, total)
            self._loop.learn(self.steps, plant.masks, outcomes)
            self._metering.beside(live=1 + len(trials))
        if self._loop.wants_probe(self.steps, plant.compact):
            gradients = absent_gradients(plant, batch, row, total)
            self._loop.observe(gradients, torch.full_like(gradients, math.nan))
            self._metering.beside(dense=3.0)
            self._event = ",".join(kind for kind in (self._event, "probe") if kind)

    @uninterrupted
    def _relayout(self, masks: Sequence[Tensor], compact: bool) -> None:
        """The one way to other masks or the other layout."""
        compact = compact and not all(bool(m.all()) for m in masks)
        same = all(torch.equal(a, b) for a, b in zip(masks, self._plant.masks, strict=True))
        if not same or compact != self._plant.compact:
            shapes, held = self._shapes, self._held
            self._checkpoints.set_aside()
            self._plant.apply(masks, compact=compact)
            self._checkpoints.admit()
            if shapes != self._shapes:
                self._replicas.reshaped()
            self._layouts.take(self._held, progress(self._setting, widths_of(masks)))
            if held != self._held:
                self._measure()
            for follower in self._followers:
                follower.apply(masks, compact=compact)

    @property
    def _held(self) -> tuple[int, ...]:
        """Widths of the tensors."""
        plant = self._plant
        return widths_of(plant.masks) if plant.compact else plant.structure.sizes

    @property
    def _shapes(self) -> list[torch.Size]:
        return [p.shape for p in self.model.parameters()]

    def _measure(self) -> None:
        """What the layout really takes, told to the loop. A masked net runs dense: nothing to see."""
        self._gauged_at = self.steps
        model = self._plant.model if self._plant.compact else None
        for resource, reading in self._metering.laid_out(self._held, model).items():
            if resource in self._setting.measured:
                self._loop.feel(resource, self._held, reading.fraction, reading.spread)

    def _settle_accounts(self) -> None:
        """What the run totals stand at, told to the loop."""
        for account in self._metering.read(self._setting, self._held):
            if account.resource in self._setting.measured:
                self._loop.feel(account.resource, self._held, account.step, account.spread)
            self._loop.account(account.resource, self._held, account.spent, account.limit)

    def _write(self, decision: Decision, before: tuple[Tensor, ...], was_compact: bool) -> None:
        plant = self._plant
        active, held = widths_of(plant.masks), self._held
        previous = widths_of(before) if was_compact else plant.structure.sizes
        narrower, wider = sum(held) < sum(previous), sum(held) > sum(previous)
        kinds = [self._event, decision.event, "shrink" if narrower else "expand" if wider else ""]
        self.history.append(
            Record(
                step=self.steps,
                loss=self._loss,
                active=active,
                widths=tuple(held),
                price=dict(decision.price),
                reference=dict(decision.reference),
                realised=dict(self._loop.realised(active)),
                off=tuple(int((a & ~b).sum()) for a, b in zip(before, plant.masks, strict=True)),
                on=tuple(int((b & ~a).sum()) for a, b in zip(before, plant.masks, strict=True)),
                event=",".join(k for k in kinds if k),
                seconds=time.process_time() - self._began,
                overhead_seconds=self._overhead,
            )
        )
        self._event = ""

    # --- replicas -------------------------------------------------------------------------------

    def replicate(self, ddp: nn.Module) -> None:
        """`ddp` is DistributedDataParallel around the model: its ranks decide together from here on.

        Called by `attach` when it is given the wrapper, and by itself at the wrapper's first forward.
        """
        inner, wrapper = unwrapped(ddp)
        if wrapper is None:
            raise TypeError(f"ddp={type(ddp).__name__}: give the DistributedDataParallel around the model")
        if not any(module is self.model for module in inner.modules()):
            raise ValueError("ddp: it wraps another model than the one that is attached")
        self._replicas.meet(wrapper, self)
        self._plant.read_later(self._replicas.when_reduced)
        self._replicas.mean([], self._fingerprint)
        if self._replicas.agree:
            self._replicas.reshaped()
        else:  # seeds that differ, say
            self._take_over(0)

    def step_absent(self) -> None:
        """The other ranks made a step, this one has run out of data (`join`)."""
        self.steps += 1
        self._metering.step()
        self._replicas.behind += 1
        self._recorder.disarm()
        self._intake.without_data()
        if self._due:
            parts = [torch.zeros_like(part) for part in self._intake.unread()[:2]]
            self._replicas.mean([*parts, torch.zeros(2)], self._fingerprint, present=False)
            self._intake.clear()
            self._postponed = True

    def rejoin(self, source: int) -> None:
        """The end of `join`: if a rank ran out of data before the others, all go on from rank `source`."""
        if float(self._replicas.total(torch.tensor([float(self._replicas.behind)]))) > 0:
            self._take_over(source)
        self._replicas.behind = 0

    def _repair(self) -> None:
        if self._plant.group is not None:
            raise RuntimeError(
                f"step {self.steps}: the ranks that hold the shards do not agree on masks or statistics; "
                "start again from the last checkpoint"
            )
        self._replicas.repairs += 1
        warnings.warn(
            f"controlprune: at step {self.steps} the replicas did not agree on masks or statistics; all "
            "of them go on from rank 0's model, optimizer and controller",
            stacklevel=5,
        )
        self._take_over(0)
        self._event = "repair"

    def _take_over(self, source: int) -> None:
        """Model, optimizer and controller as they are on rank `source`."""
        parts = [part for part in (self, self.model, self._plant.optimizer) if part is not None]
        mine = self._replicas.rank == source
        states = self._replicas.broadcast([p.state_dict() for p in parts] if mine else None, source)
        if not mine:
            for part, state in zip(parts, states, strict=True):
                part.load_state_dict(state)
        self._replicas.reshaped()

    @property
    def _fingerprint(self) -> list[int]:
        """Of all that decides: it is the same on every rank."""
        if self._replicas.alone:
            return []
        plant = self._plant
        found = [list(plant.masks), plant.compact, self._loop.state_dict()]
        return digest([self.steps, self._survey.mark, *found])


def _plant(
    model: nn.Module, optimizer: Optimizer | None, structure: Structure, park_on: torch.device | None
) -> Plant:
    if not is_sharded(model):
        return Plant(model, optimizer, structure, park_on=park_on)
    if optimizer is None:
        raise ValueError("optimizer=None: sharded parameters need one; give the optimizer that steps them")
    from ..plant.sharded import ShardedPlant  # it imports a good deal of torch

    return ShardedPlant(model, optimizer, structure)


def new_history(setting: Setting) -> History:
    structure = setting.structure
    return History(structure.names, structure.sizes, setting.budget, setting.total_steps)
