"""The controller: composes the loop around a user's model and optimizer. The one wiring point.

    optimizer.step()   -> step hook: gate gradients are read before the optimizer runs
    controller.step(L) -> observer, gate controller, planner, solver, regulator -> masks -> plant

Every block lives in its own file; here they only meet. A step that the optimizer skipped (AMP), or whose
loss or gradients are not finite, is not observed, and counted.
"""

from __future__ import annotations

import copy
import logging
import math
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .accounts import Accounts
from .budget import TOTALS, UNITS, Budget, Price, Target
from .checkpoint import Checkpoints
from .cost.flops import flops
from .experiments import ablations, absent_gradients
from .gauge import Gauge
from .history import History, Record
from .instruments import Instruments
from .intake import Intake
from .layouts import Layouts
from .links import Link
from .masking import Plant, checked
from .policies.base import Decision, Policy, Setting
from .policies.pace import recompile_pays
from .replay import Batch, Recorder, batch_size
from .structure.groups import Group

__all__ = ["Controller", "Cost", "require_unattached"]

log = logging.getLogger("controlprune")
FORMAT = 2  # of Controller.state_dict
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
        settle: Callable[[Budget | Price], Setting],
        policy: Policy,
        instruments: Instruments,
        gauge: Gauge | None = None,
        park_on: torch.device | None = None,
    ) -> None:
        self._budget, self._settle, self._policy = budget, settle, policy
        setting = self._setting = settle(budget)
        self._plant = Plant(model, optimizer, setting.structure, park_on=park_on)
        self._loop = policy.begin(setting)
        self._recorder = Recorder(model)
        self._checkpoints = Checkpoints(self._plant, optimizer, self._relayout)
        self._hook = optimizer.register_step_pre_hook(Link(self, Controller._observe))
        self._followers: list[Plant] = []
        self._layouts = Layouts({setting.structure.sizes: 0.0})
        structure = setting.structure
        self._work = flops(structure)
        self._instruments, self._gauge = instruments, gauge
        self._accounts = self._open_accounts()
        self.history = _new_history(setting)
        self.steps = 0
        self._intake = Intake(self._plant)
        self._loss = math.nan
        self._overhead = 0.0
        self._began = time.process_time()
        self._event = ""
        self._use = 1.0  # of a step in this layout, fraction of the dense FLOPs
        self._live = True
        _attached[model] = weakref.ref(self)
        if structure.refused:
            log.info("%d index spaces are left alone; see controller.report()", len(structure.refused))
        self._begin()
        self._arm()

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
        use = self._loop.realised(self._widths_of(self._plant.masks, True))
        now = {
            k: (use[k] * setting.dense[k], setting.dense[k]) for k in setting.costs if k not in setting.totals
        }
        spent, whole = self._accounts.used(), self._accounts.dense()
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
        setting = self._settle(budget)
        self._budget, self._setting = budget, setting
        self._accounts.retarget(_run_targets(budget))
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

    def _observe(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Before the optimizer runs: are there gradients, and what do the gates see?"""
        started = time.process_time()
        self._checkpoints.require_admitted()
        self._intake.before_step(optimizer, read=self._loop.wants_gradients(self.steps + 1))
        self._overhead += time.process_time() - started

    def step(self, loss: Tensor | float) -> None:
        """A training step with this loss is done. Call it after `optimizer.step()`."""
        self._require_live("step")
        started = time.process_time()
        on_host = self._intake.after_step(loss)
        self.steps += 1
        self._accounts.step(self._use)
        if self.steps == self._setting.total_steps + 1:
            warnings.warn(
                f"controlprune: step {self.steps} is past total_steps={self._setting.total_steps}; the masks "
                "hold from here on",
                stacklevel=2,
            )
        due = self._loop.wants_decision(self.steps) and self.steps <= self._setting.total_steps
        row = self._read() if due or on_host else None
        if due:
            self._update(row)
        self._arm()
        self._overhead += time.process_time() - started

    def _read(self) -> Tensor | None:
        """Hand the steps since the last reading to the loop; the last one's row if it was good."""
        row = None
        for step in self._intake.read():
            if math.isfinite(step.loss):
                self._loss = step.loss
                self._loop.watch(self.steps, step.loss)
            if step.good and step.row is not None:
                self._loop.observe(step.row, torch.full_like(step.row, math.nan))
            row = step.row if step.good else None
        return row

    @property
    def skipped(self) -> int:
        """Steps whose loss or gradients were not finite, or that the optimizer skipped."""
        return self._intake.skipped

    def _arm(self) -> None:
        """Record the next step's batch where the loop wants it; once at least, to tell a compiled model."""
        step, last = self.steps + 1, self._setting.total_steps
        looks = not self._layouts.looked and self._loop.wants_decision(step)
        if 1 < step <= last and not self._layouts.compiled and (looks or self._loop.wants_batch(step)):
            self._layouts.looked = True
            self._recorder.arm()

    def _update(self, row: Tensor | None) -> None:
        if self._recorder.armed:
            self._layouts.compiled = True
            self._recorder.disarm()
        batch = self._recorder.take()
        if self._intake.bad_in_a_row:
            return
        plant = self._plant
        self._settle_accounts()
        self._weigh()
        if batch is not None:
            self._calibrate(batch, row)
        before, was_compact = plant.masks, plant.compact
        decision = self._loop.decide(self.steps, plant.masks, plant.compact)
        layout = self._layout_of(decision)
        if layout is not None:
            self._relayout(decision.masks, layout)
        self._write(decision, before, was_compact)

    def _weigh(self) -> None:
        """Norms are read where something is to be decided, and not kept."""
        weights = torch.cat(self._plant.weight_norms()).cpu()
        self._loop.observe(torch.full_like(weights, math.nan), weights)

    def _layout_of(self, decision: Decision) -> bool | None:
        """Compact or not, as decided; where a compiled model may not take those shapes (layouts.py), masked,
        which changes none, if it is so now, else None: hold."""
        setting, compact = self._setting, self._plant.compact
        resource = next(iter(setting.costs))
        now, then = (
            self._widths_of(self._plant.masks, compact),
            self._widths_of(decision.masks, decision.compact),
        )
        held, wanted = setting.fraction(resource, now), setting.fraction(resource, then)
        pays = recompile_pays(setting, held, wanted, setting.total_steps - self.steps)
        if self._layouts.admits(then, self._progress(decision.masks), pays):
            return decision.compact
        return None if compact else False

    def _widths_of(self, masks: Sequence[Tensor], compact: bool) -> tuple[int, ...]:
        return tuple(int(m.sum()) for m in masks) if compact else self._setting.structure.sizes

    def _progress(self, masks: Sequence[Tensor]) -> float:
        """How far from dense (0) to the budget (1), by the resource that is furthest behind."""
        widths = self._widths_of(masks, True)
        target = {k: r for k, r in self._setting.budget.items() if r < 1.0}
        return min(
            ((1.0 - self._setting.fraction(k, widths)) / (1.0 - r) for k, r in target.items()), default=0.0
        )

    def _calibrate(self, batch: Batch, row: Tensor | None) -> None:
        """Paired ablations and probes on the recorded batch, as far as the loop asks for them."""
        plant = self._plant
        if not any(g is not None for g in batch.gradients):
            return
        self._loop.see_batch(batch_size((batch.args, batch.kwargs)))
        trials = self._loop.trials(self.steps, plant.masks, plant.compact)
        if trials:
            self._loop.learn(self.steps, plant.masks, ablations(plant, batch, self._loss, trials))
            self._accounts.beside((1 + len(trials)) * self._use)
        if self._loop.wants_probe(self.steps, plant.compact):
            gradients = absent_gradients(plant, batch, row)
            self._loop.observe(gradients, torch.full_like(gradients, math.nan))
            self._accounts.beside(3.0)
            self._event = ",".join(kind for kind in (self._event, "probe") if kind)

    def _relayout(self, masks: Sequence[Tensor], compact: bool) -> None:
        """The one way to other masks or the other layout."""
        compact = compact and not all(bool(m.all()) for m in masks)
        same = all(torch.equal(a, b) for a, b in zip(masks, self._plant.masks, strict=True))
        if not same or compact != self._plant.compact:
            self._read()
            self._checkpoints.set_aside()
            self._plant.apply(masks, compact=compact)
            self._checkpoints.admit()
            self._layouts.take(self._widths_of(masks, compact), self._progress(masks))
            self._laid_out()
            for follower in self._followers:
                follower.apply(masks, compact=compact)

    def _laid_out(self) -> None:
        """The tensors have other shapes than before."""
        widths = self._held()
        self._use = self._work.value(widths) / self._setting.flops
        if self._plant.compact:
            self._measure(widths)
        self._accounts.laid_out()

    def _held(self) -> tuple[int, ...]:
        """Widths of the tensors."""
        return self._widths_of(self._plant.masks, self._plant.compact)

    def _measure(self, widths: tuple[int, ...]) -> None:
        """What these widths really take, told to the loop."""
        if self._gauge is None:
            return
        for resource, reading in self._gauge.read(self._plant.model).items():
            if resource in self._setting.measured:
                self._loop.feel(resource, widths, reading.fraction, reading.spread)
            self._accounts.beside(reading.rounds * (1.0 + self._use))

    def _settle_accounts(self) -> None:
        """What the run totals stand at, told to the loop."""
        widths = self._held()
        modelled = {name: self._setting.fraction(name, widths) for name in self._setting.totals}
        for account in self._accounts.read(modelled):
            if account.resource in self._setting.measured:
                self._loop.feel(account.resource, widths, account.step, account.spread)
            self._loop.account(account.resource, widths, account.spent, account.limit)

    def _open_accounts(self) -> Accounts:
        targets = _run_targets(self._budget)
        return Accounts(targets, self._setting.total_steps, 3.0 * self._setting.flops, self._instruments)

    def _write(self, decision: Decision, before: tuple[Tensor, ...], was_compact: bool) -> None:
        plant = self._plant
        active = tuple(int(m.sum()) for m in plant.masks)
        held = active if plant.compact else plant.structure.sizes
        previous = tuple(int(m.sum()) for m in before) if was_compact else plant.structure.sizes
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

    def finalize(self) -> nn.Module:
        """The same model object, plain, dense and small, inside the budget; the optimizer stays valid."""
        self._require_live("finalize")
        self._checkpoints.require_admitted()
        before, was_compact = self._plant.masks, self._plant.compact
        self._weigh()
        decision = self._loop.last(before)
        if any(not torch.equal(a, b) for a, b in zip(decision.masks, before, strict=True)):
            log.warning("finalize: the run ended above the budget; units were switched off to meet it")
        self._relayout(decision.masks, True)
        for _ in range(CORRECTIONS if self._gauge is not None else 0):
            again = self._loop.last(self._plant.masks)  # what was measured just now counts
            if all(torch.equal(a, b) for a, b in zip(again.masks, decision.masks, strict=True)):
                break
            decision = again
            self._relayout(decision.masks, True)
        self._event = "finalize"
        self._write(decision, before, was_compact)
        for plant in (self._plant, *self._followers):
            plant.harden()
        self._close()
        return self._plant.model

    def detach(self) -> nn.Module:
        """The model as it was found: dense, with all learned weights, no hooks."""
        self._require_live("detach")
        for plant in (self._plant, *self._followers):
            plant.release()
        self._close()
        return self._plant.model

    def _close(self) -> None:
        self._live = False
        self._hook.remove()
        self._recorder.disarm()
        self._checkpoints.remove()
        _attached.pop(self._plant.model, None)

    def _require_live(self, what: str) -> None:
        if not self._live:
            raise RuntimeError(f"{what}: this controller was finalized or detached; attach a new one")

    # --- saved and restored ---------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything the loop needs to go on as if it had not stopped: plain containers, a copy."""
        self._require_live("state_dict")
        self._read()
        structure = self._setting.structure
        state = {
            "format": FORMAT,
            "policy": type(self._policy).__name__,
            "groups": dict(zip(structure.names, structure.sizes, strict=True)),
            "plant": self._plant.state_dict(),
            "loop": self._loop.state_dict(),
            "history": self.history.state_dict(),
            "budget": _given(self._budget),
            "accounts": self._accounts.state_dict(),
            "counts": [self.steps, self._intake.skipped, self._intake.bad_in_a_row],
            "loss": self._loss,
            "layouts": self._layouts.state_dict(),
            "seconds": [time.process_time() - self._began, self._overhead],
        }
        return copy.deepcopy(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume. The state must come from a controller of the same model; nothing changes if it does not."""
        self._require_live("load_state_dict")
        self._check_state(state)
        try:
            state = copy.deepcopy(dict(state))
            budget = _asked(state["budget"])
            setting = self._settle(budget)
            loop = self._policy.begin(setting)
            loop.load_state_dict(state["loop"])
            _new_history(self._setting).load_state_dict(state["history"])
            accounts = self._open_accounts()
            accounts.retarget(_run_targets(budget))
            accounts.load_state_dict(state["accounts"])
            counts = tuple(int(n) for n in state["counts"])
            times = tuple(float(x) for x in state["seconds"])
            layouts = Layouts.of(state["layouts"])
            loss, (steps, skipped, bad), (seconds, overhead) = float(state["loss"]), counts, times
            self._read()
            self._checkpoints.set_aside()
            self._plant.load_state_dict(state["plant"])
        except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            self._checkpoints.admit()
            raise ValueError(
                f"state_dict: it is corrupt or of another model ({type(error).__name__}: {error}); nothing "
                "was changed, load one that this package wrote for this model"
            ) from error
        self._checkpoints.admit()
        for follower in self._followers:
            follower.apply(self._plant.masks, compact=self._plant.compact)
        self._loop, self._budget, self._setting = loop, budget, setting
        self._accounts, self._layouts = accounts, layouts
        self._use = self._work.value(self._held()) / setting.flops
        self.history.load_state_dict(state["history"])
        self.steps, self._loss = steps, loss
        self._intake.skipped, self._intake.bad_in_a_row = skipped, bad
        self._overhead, self._began = overhead, time.process_time() - seconds
        self._recorder.disarm()
        self._arm()

    def _check_state(self, state: object) -> None:
        structure = self._setting.structure
        if not isinstance(state, Mapping) or "format" not in state or "groups" not in state:
            raise ValueError("state_dict: this is not a controller's state_dict")
        if not isinstance(state["format"], int) or state["format"] > FORMAT:
            raise ValueError(
                f"state_dict: format {state['format']} was written by a newer controlprune; this one reads "
                f"{FORMAT}: update the package"
            )
        if state["groups"] != dict(zip(structure.names, structure.sizes, strict=True)):
            raise ValueError("state_dict: its groups are not this model's; it belongs to another model")
        parts = ("plant", "loop", "history", "accounts", "layouts")
        needed = ("policy", *parts, "budget", "counts", "loss", "seconds")
        missing = [key for key in needed if key not in state]
        if missing:
            raise ValueError(f"state_dict: it is incomplete, {', '.join(missing)} missing")
        if state["policy"] != type(self._policy).__name__:
            raise ValueError(
                f"state_dict: it was saved under the policy {state['policy']}, this controller's is "
                f"{type(self._policy).__name__}; attach with the same one"
            )


def _new_history(setting: Setting) -> History:
    structure = setting.structure
    return History(structure.names, structure.sizes, setting.budget, setting.total_steps)


def _run_targets(budget: Budget | Price) -> dict[str, Target]:
    targets = budget.targets() if isinstance(budget, Budget) else {}
    return {name: target for name, target in targets.items() if name in TOTALS}


def _given(budget: Budget | Price) -> dict[str, Any]:
    """A budget as plain values."""
    values = {field.name: getattr(budget, field.name) for field in fields(budget)}
    return {"kind": type(budget).__name__} | {k: v for k, v in values.items() if v is not None}


def _asked(given: Mapping[str, Any]) -> Budget | Price:
    values = {k: v for k, v in given.items() if k != "kind"}
    return {"Budget": Budget, "Price": Price}[given["kind"]](**values)
