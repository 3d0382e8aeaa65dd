"""What a user holds of the loop: the one new line in theirs, what can be read, done by hand, ended and saved.

How it runs inside is loop/run.py.
"""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..budget import UNITS, Budget, Price, require_budget
from ..cost.survey import Survey
from ..plant.interrupts import uninterrupted
from ..plant.plant import Plant, checked
from ..policies.base import Decision
from ..state.resume import FORMAT, budget_of, plain_budget, require_alike, require_state, signed
from ..structure.groups import Group, widths_of
from ..structure.portable import misfit
from .intake import Intake
from .recompile import Layouts
from .run import Wiring, attached, new_history

__all__ = ["Controller", "Cost"]

log = logging.getLogger("controlprune")
CORRECTIONS = 4  # of a measured resource that finalize finds above its limit
READINGS = 2  # times, before anything is decided
TOLD = 0.05  # of a limit: a measured use further above it is said


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


class Controller(Wiring):
    """A running loop. `step(loss)` after `optimizer.step()`; `finalize()` at the end."""

    # --- what the user reads --------------------------------------------------------------------

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
        require_budget(budget)
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

    @uninterrupted
    def step(self, loss: Tensor | float | None = None) -> None:
        """A training step with this loss is done. Call it after `optimizer.step()`.

        `loss`: None where a framework does not give it: what the optimizer's closure returned, or unknown.
        It may be called for each of several batches whose gradients accumulate, or once for all of them. Of a
        loop without an optimizer it reads the gradients, so there it comes before `zero_grad`.
        """
        self._require_live("step")
        if self._plant.optimizer is None:
            self._see(None, None)
        started = time.process_time()
        self._metering.enter()
        wanted = self._loop.wants_gradients(self.steps + 1)
        full = self._intake.after_step(loss, wanted=wanted)
        self.steps += 1
        self._metering.step()
        if self.steps == self._setting.total_steps + 1:
            warnings.warn(
                f"controlprune: step {self.steps} is past total_steps={self._setting.total_steps}; the "
                "masks hold from here on",
                stacklevel=3,
            )
        trouble = self._intake.cadence.trouble(self._setting.total_steps)
        if trouble:
            warnings.warn(f"controlprune: nothing is controlled: {trouble}", stacklevel=3)
        self._replicas.watch_for_ddp(self.model, self.replicate)
        if self._due and self._intake.idle and self._replicas.alone:
            self._postponed = True
        elif self._due:
            self._update()
        elif full and self._replicas.alone:
            self._read()
        self._arm()
        self._metering.leave()
        self._overhead += time.process_time() - started

    @property
    def skipped(self) -> int:
        """Steps whose loss or gradients were not finite, or that the optimizer skipped."""
        if self._live and self._replicas.alone:
            self._read()
        return self._intake.skipped

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

    @uninterrupted
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
        gauged = self._metering.gauge is not None
        for _ in range(READINGS if gauged else 0):
            self._measure()  # no unit goes, or stays, for one bad measurement
        decision = self._loop.last(before)
        self._relayout(decision.masks, into is None)
        for _ in range(CORRECTIONS if gauged else 0):
            decision = self._loop.last(before)  # what was measured just now counts, both ways
            if all(torch.equal(a, b) for a, b in zip(decision.masks, self._plant.masks, strict=True)):
                break
            self._relayout(decision.masks, True)
        if any(not torch.equal(a, b) for a, b in zip(decision.masks, before, strict=True)):
            log.warning("finalize: the run ended above the budget; units were switched off to meet it")
        self._say_what_is_missed(decision)
        self._event = "finalize"
        self._write(decision, before, was_compact)
        small = self._plant.model if into is None else self._plant.gathered(into)
        for plant in (self._plant, *self._followers):
            plant.harden()
        self._close(small=into is None)
        return small

    def _say_what_is_missed(self, decision: Decision) -> None:
        use = self._loop.realised(widths_of(decision.masks))
        over = [
            f"{name} is {use[name]:.3g} of dense, {limit:.3g} was asked"
            for name, limit in self._setting.budget.items()
            if name in self._setting.measured and use[name] > limit * (1.0 + TOLD)
        ]
        if over:
            warnings.warn(
                f"controlprune: finalize: {'; '.join(over)}; no smaller net was found, as measured just now. "
                "Loosen it, or look for what else ran on this machine",
                stacklevel=4,
            )

    @uninterrupted
    def detach(self) -> nn.Module:
        """The model as it was found: dense, with all learned weights, no hooks."""
        self._require_live("detach")
        for plant in (self._plant, *self._followers):
            plant.release()
        self._replicas.reshaped()
        self._close()
        return self._plant.model

    def _close(self, *, small: bool = False) -> None:
        self._live = False
        for hook in self._hooks:
            hook.remove()
        self._strangers.remove()
        self._recorder.disarm()
        self._replicas.close()
        self._checkpoints.remove(small=small)
        attached.pop(self._plant.model, None)

    def _require_live(self, what: str) -> None:
        if not self._live:
            raise RuntimeError(f"{what}: this controller was finalized or detached; attach a new one")

    # --- saved and restored ---------------------------------------------------------------------

    def sync(self) -> None:
        """Read the steps since the last update now, on every rank: call it before only one rank saves."""
        self._require_live("sync")
        self._read()

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
            "counts": [self.steps, self._gauged_at, int(self._postponed)],
            "intake": self._intake.state_dict(),
            "loss": self._loss,
            "layouts": self._layouts.state_dict(),
            "seconds": [time.process_time() - self._began, self._overhead],
        }
        return signed(copy.deepcopy(state))

    @uninterrupted
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
            new_history(self._setting).load_state_dict(state["history"])
            accounts = self._metering.restored(budget, state["accounts"])
            require_alike({"counts": [0, 0, 0]}, {"counts": state["counts"]})
            steps, gauged_at, postponed = state["counts"]
            seconds, overhead = (float(x) for x in state["seconds"])
            layouts, loss = Layouts.of(state["layouts"]), float(state["loss"])
            intake = Intake(self._plant)
            intake.load_state_dict(state["intake"])
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
        self.steps, self._gauged_at, self._loss = steps, gauged_at, loss
        self._postponed = bool(postponed)
        self._overhead, self._began = overhead, time.process_time() - seconds
        self._recorder.disarm()
        self._arm()
