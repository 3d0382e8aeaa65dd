"""The controller: composes the loop around a user's model and optimizer. The one wiring point.

    optimizer.step()   -> step hook: gate gradients are read before the optimizer runs
    controller.step(L) -> observer, gate controller, planner, solver, regulator -> masks -> plant

Every block lives in its own file; here they only meet. A step that the optimizer skipped (AMP), or whose
loss or gradients are not finite, is not observed, and counted. Among replicas (distributed.py) the steps
between two updates are read together at the update, so that every rank decides alike.
"""

from __future__ import annotations

import copy
import logging
import math
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .budget import UNITS, Budget, Price
from .checkpoint import Checkpoints
from .distributed import Replicas, digest, is_sharded, unwrapped
from .experiments import ablations, absent_gradients
from .gauge import Gauge
from .history import History, Record
from .instruments import Instruments
from .intake import Intake
from .interrupts import uninterrupted
from .layouts import Layouts, progress, widths_of
from .links import Link
from .masking import Plant, checked
from .metering import Metering
from .policies.base import Decision, Policy, Setting
from .replay import Batch, Recorder, batch_size
from .resources import Survey
from .resume import FORMAT, budget_of, plain_budget, require_alike, require_state, signed
from .structure.groups import Group, Structure
from .structure.portable import misfit

__all__ = ["Controller", "Cost", "require_unattached"]

log = logging.getLogger("controlprune")
CORRECTIONS = 4  # of a measured resource that finalize finds above its limit

_attached: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Controller]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Cost:
    """A resource: its use now and when dense, in `unit` (FLOP: one forward of the example inputs).

    Of a run total: what was spent so far, and what the whole dense run would take (nan: not known yet).
    """

    value: float
    dense: float
    unit: str
    per_example: float | None = None

    @property
    def fraction(self) -> float:
        return self.value / self.dense


def require_unattached(model: nn.Module) -> None:
    """RuntimeError if a controller is at work on this model."""
    reference = _attached.get(model)
    if reference is not None and reference() is not None:
        raise RuntimeError("model: a controller is attached to it; call its finalize() or detach() first")


class Controller:
    """A running loop. `step(loss)` after `optimizer.step()`; `finalize()` at the end."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
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
        self._hook = optimizer.register_step_pre_hook(Link(self, Controller._observe))
        self._followers: list[Plant] = []
        self._layouts = Layouts({setting.structure.sizes: 0.0})
        structure = setting.structure
        self._replicas = Replicas()
        self._metering = Metering(setting, budget, instruments, gauge, self._replicas.mean_known)
        self.history = _new_history(setting)
        self.steps = 0
        self._intake = Intake(self._plant)
        self._postponed = False  # an update that was due while a replica had no data
        self._loss = self._own_loss = math.nan
        self._overhead = 0.0
        self._began = time.process_time()
        self._event = ""
        self._live = True
        _attached[model] = weakref.ref(self)
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

    # --- what the user reads --------------------------------------------------------------------

    @property
    def plant(self) -> Plant:
        """The model and optimizer as they are laid out now."""
        return self._plant

    @property
    def model(self) -> nn.Module:
        return self._plant.model

    @property
    def groups(self) -> tuple[Group, ...]:
        return self._setting.structure.groups

    @property
    def masks(self) -> dict[str, Tensor]:
        """Copies: changing one changes nothing; use `set_masks`."""
        return {g.name: m.clone() for g, m in zip(self.groups, self._plant.masks, strict=True)}

    def cost(self) -> dict[str, Cost]:
        """Realised use of the budgeted resources, counted on the active units."""
        setting = self._setting
        use = self._loop.realised(widths_of(self._plant.masks))
        now = {
            k: (use[k] * setting.dense[k], setting.dense[k]) for k in setting.costs if k not in setting.totals
        }
        spent, whole = self._metering.accounts.used(), self._metering.accounts.dense()
        now |= {name: (spent[name], whole[name]) for name in spent}
        return {
            name: Cost(value, dense, UNITS[name], value / setting.batch if name == "flops" else None)
            for name, (value, dense) in now.items()
        }

    @property
    def budget(self) -> Budget | Price:
        """What is asked for. It may be set during the run, tighter or looser."""
        return self._budget

    @budget.setter
    def budget(self, budget: Budget | Price) -> None:
        self._require_live("budget")
        if not isinstance(budget, Budget | Price):
            raise TypeError(
                f"budget={budget!r}: give controlprune.Budget(flops=0.5) or controlprune.Price(flops=…)"
            )
        setting = self._settle(budget, self._survey)
        self._metering.retarget(budget)
        self._budget, self._setting = budget, setting
        self._loop.retarget(setting)
        self._event = "budget"

    def report(self) -> str:
        """Groups, what is refused and why, and how well the gate controller predicts."""
        lines = [f"{len(self.groups)} groups, {len(self._setting.structure.refused)} refused"]
        for group, mask in zip(self.groups, self._plant.masks, strict=True):
            lines.append(f"  {group.name}: {int(mask.sum())} of {group.size} {group.kind} units active")
        lines += [f"  refused {r.name} ({r.size}): {r.reason}" for r in self._setting.structure.refused]
        scores = self.gate_scores()
        if scores:
            ranked = ", ".join(f"{name} {value:.2f}" for name, value in scores.items())
            lines.append(f"  rank correlation with measured ablations: {ranked}")
        lines += [f"  {line}" for line in self._loop.describe()]
        lines.append(f"  {self._layouts}")
        lines.append(f"  {self.steps} steps, {self.skipped} skipped; overhead {self._overhead:.2f} s CPU")
        lines += self._replicas.describe()
        return "\n".join(lines)

    @property
    def overhead_seconds(self) -> float:
        """Process CPU time spent in the controller so far."""
        return self._overhead

    def gate_scores(self) -> dict[str, float]:
        """Rank correlation of each value predictor with the measured ablations of this run."""
        gates = getattr(self._loop, "gates", None)
        return gates.scores() if gates is not None else {}

    # --- the loop -------------------------------------------------------------------------------

    @uninterrupted()
    def _observe(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Before the optimizer runs: are there gradients, and what do the gates see?"""
        started = time.process_time()
        self._metering.enter()
        self._checkpoints.require_admitted()
        read = self._loop.wants_gradients(self.steps + 1) or self._recorder.batch is not None
        self._intake.before_step(optimizer, read=read)
        self._metering.leave()
        self._overhead += time.process_time() - started

    def step(self, loss: Tensor | float) -> None:
        """A training step with this loss is done. Call it after `optimizer.step()`."""
        self._require_live("step")
        with uninterrupted():
            started = time.process_time()
            self._metering.enter()
            full = self._intake.after_step(loss)
            self.steps += 1
            self._metering.step()
            if self.steps == self._setting.total_steps + 1:
                warnings.warn(
                    f"controlprune: step {self.steps} is past total_steps={self._setting.total_steps}; the "
                    "masks hold from here on",
                    stacklevel=2,
                )
            self._replicas.watch_for_ddp(self.model, self.replicate)
            if self._due:
                self._update()
            elif full and self._replicas.alone:
                self._read()
            self._arm()
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

    @property
    def skipped(self) -> int:
        """Steps whose loss or gradients were not finite, or that the optimizer skipped."""
        if self._live and self._replicas.alone:
            self._read()
        return self._intake.skipped

    def _arm(self) -> None:
        """Record the next step's batch where the loop wants it; once at least, to tell a compiled model."""
        step, last = self.steps + 1, self._setting.total_steps
        looks = not self._layouts.looked and self._loop.wants_decision(step)
        if 1 < step <= last and not self._layouts.compiled and (looks or self._loop.wants_batch(step)):
            self._layouts.looked = True
            self._recorder.arm()

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
        self._postponed = self._replicas.present < self._replicas.size
        if self._postponed or self._intake.bad_in_a_row:
            return
        plant = self._plant
        self._settle_accounts()
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

    @uninterrupted()
    def _relayout(self, masks: Sequence[Tensor], compact: bool) -> None:
        """The one way to other masks or the other layout."""
        compact = compact and not all(bool(m.all()) for m in masks)
        same = all(torch.equal(a, b) for a, b in zip(masks, self._plant.masks, strict=True))
        if not same or compact != self._plant.compact:
            shapes = self._shapes
            self._checkpoints.set_aside()
            self._plant.apply(masks, compact=compact)
            self._checkpoints.admit()
            if shapes != self._shapes:
                self._replicas.reshaped()
            self._layouts.take(self._held, progress(self._setting, widths_of(masks)))
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
        """What the new layout really takes, told to the loop. A masked net runs dense: nothing to see."""
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

    def sync(self) -> None:
        """Read the steps since the last update now, on every rank: call it before only one rank saves."""
        self._require_live("sync")
        self._read()

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
            self._intake.load_state_dict([])
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
            stacklevel=4,
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

    # --- by hand --------------------------------------------------------------------------------

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Exactly these masks until the next update; groups that are not named keep theirs."""
        self._require_live("set_masks")
        if not isinstance(masks, Mapping):
            raise TypeError(f"masks={type(masks).__name__}: give a mapping from group name to a bool tensor")
        names = self._setting.structure.names
        unknown = [name for name in masks if name not in names]
        if unknown:
            raise ValueError(f"masks: no group is called {unknown[0]!r}; the groups are {', '.join(names)}")
        now = dict(zip(names, self._plant.masks, strict=True))
        wanted = [masks.get(name, now[name]) for name in names]
        self._relayout(checked(wanted, self._setting.structure), self._plant.compact)

    def shrink(self) -> None:
        """Take dormant units out of the tensors, now."""
        self._require_live("shrink")
        self._relayout(self._plant.masks, True)

    def expand(self) -> None:
        """Put them back, exactly; they stay dormant."""
        self._require_live("expand")
        self._relayout(self._plant.masks, False)

    def follow(self, model: nn.Module) -> None:
        """Keep a copy of the model (an average of its weights, say) at the same units and layout.

        `model`: a copy made while the attached one has its dense shapes, such as `AveragedModel(m).module`.
        """
        self._require_live("follow")
        follower = Plant(model, None, self._setting.structure, park_on=self._plant.park_on)
        follower.apply(self._plant.masks, compact=self._plant.compact)
        self._followers.append(follower)

    # --- the end --------------------------------------------------------------------------------

    @uninterrupted()
    def finalize(self, into: nn.Module | None = None) -> nn.Module:
        """The same model object, plain, dense and small, inside the budget; the optimizer stays valid.

        `into`: where the parameters are sharded, a plain dense model of the same class, on every rank: it
        gets the gathered weights and becomes the small one; the sharded model stays masked, without hooks.
        """
        self._require_live("finalize")
        if (into is None) != (self._plant.group is None):
            raise ValueError(
                "into: sharded parameters keep their shapes; give finalize(into=model) a plain dense model "
                "of the same class on every rank, which becomes the small one"
                if into is None
                else "into: only where the parameters are sharded; call finalize()"
            )
        if into is not None and (wrong := misfit(self._plant.structure, into)):
            raise ValueError(f"into: {wrong}; give a plain dense model of the class that is sharded")
        self._checkpoints.require_admitted()
        before, was_compact = self._plant.masks, self._plant.compact
        self._weigh()
        decision = self._loop.last(before)
        if any(not torch.equal(a, b) for a, b in zip(decision.masks, before, strict=True)):
            log.warning("finalize: the run ended above the budget; units were switched off to meet it")
        self._relayout(decision.masks, into is None)
        for _ in range(CORRECTIONS if self._metering.gauge is not None else 0):
            again = self._loop.last(self._plant.masks)  # what was measured just now counts
            if all(torch.equal(a, b) for a, b in zip(again.masks, decision.masks, strict=True)):
                break
            decision = again
            self._relayout(decision.masks, True)
        self._event = "finalize"
        self._write(decision, before, was_compact)
        small = self._plant.model if into is None else self._plant.gathered(into)
        for plant in (self._plant, *self._followers):
            plant.harden()
        self._close()
        return small

    @uninterrupted()
    def detach(self) -> nn.Module:
        """The model as it was found: dense, with all learned weights, no hooks."""
        self._require_live("detach")
        for plant in (self._plant, *self._followers):
            plant.release()
        self._replicas.reshaped()
        self._close()
        return self._plant.model

    def _close(self) -> None:
        self._live = False
        self._hook.remove()
        self._recorder.disarm()
        self._replicas.close()
        self._checkpoints.remove()
        _attached.pop(self._plant.model, None)

    def _require_live(self, what: str) -> None:
        if not self._live:
            raise RuntimeError(f"{what}: this controller was finalized or detached; attach a new one")

    # --- saved and restored ---------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything the loop needs to go on as if it had not stopped: plain containers, a copy."""
        self._require_live("state_dict")
        if self._replicas.alone:
            self._read()
        structure = self._setting.structure
        state = {
            "format": FORMAT,
            "policy": type(self._policy).__name__,
            "groups": dict(zip(structure.names, structure.sizes, strict=True)),
            "plant": self._plant.state_dict(),
            "loop": self._loop.state_dict(),
            "history": self.history.state_dict(),
            "budget": plain_budget(self._budget),
            "survey": self._survey.state_dict(),
            "accounts": self._metering.accounts.state_dict(),
            "counts": [self.steps, self._intake.skipped, self._intake.bad_in_a_row],
            "unread": self._intake.state_dict(),
            "loss": self._loss,
            "layouts": self._layouts.state_dict(),
            "seconds": [time.process_time() - self._began, self._overhead],
        }
        return signed(copy.deepcopy(state))

    @uninterrupted()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume. The state must come from a controller of the same model; nothing changes if it does not."""
        self._require_live("load_state_dict")
        require_state(state, self._setting.structure, type(self._policy).__name__)
        try:
            state = copy.deepcopy(dict(state))
            budget, survey = budget_of(state["budget"]), Survey.of(state["survey"])
            setting = self._settle(budget, survey)
            loop = self._policy.begin(setting)
            require_alike(loop.state_dict(), state["loop"])
            loop.load_state_dict(state["loop"])
            _new_history(self._setting).load_state_dict(state["history"])
            accounts = self._metering.restored(budget, state["accounts"])
            require_alike({"counts": [0, 0, 0]}, {"counts": state["counts"]})
            steps, skipped, bad = state["counts"]
            seconds, overhead = (float(x) for x in state["seconds"])
            layouts, loss = Layouts.of(state["layouts"]), float(state["loss"])
            intake = Intake(self._plant)
            intake.load_state_dict(state["unread"])
            intake.skipped, intake.bad_in_a_row = skipped, bad
            shapes = self._shapes
            self._checkpoints.set_aside()
            self._plant.load_state_dict(state["plant"])
        except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            self._checkpoints.admit()
            raise ValueError(
                f"state_dict: it is corrupt or of another model ({type(error).__name__}: {error}); nothing "
                "was changed, load one that this package wrote for this model"
            ) from error
        self._checkpoints.admit()
        if shapes != self._shapes:
            self._replicas.reshaped()
        for follower in self._followers:
            follower.apply(self._plant.masks, compact=self._plant.compact)
        self._loop, self._intake, self._layouts = loop, intake, layouts
        self._budget, self._survey, self._setting = budget, survey, setting
        self._metering.take(accounts, survey, self._held)
        self.history.load_state_dict(state["history"])
        self.steps, self._loss = steps, loss
        self._overhead, self._began = overhead, time.process_time() - seconds
        self._recorder.disarm()
        self._arm()


def _plant(
    model: nn.Module, optimizer: Optimizer, structure: Structure, park_on: torch.device | None
) -> Plant:
    if not is_sharded(model):
        return Plant(model, optimizer, structure, park_on=park_on)
    from .sharded import ShardedPlant  # it imports a good deal of torch

    return ShardedPlant(model, optimizer, structure)


def _new_history(setting: Setting) -> History:
    structure = setting.structure
    return History(structure.names, structure.sizes, setting.budget, setting.total_steps)
