"""What a user holds of the loop: the one new line in theirs, what can be read, done by hand, ended and saved.

How it runs inside is loop/run.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..budget import UNITS, Budget, Price, require_budget
from ..cost.problem import require_steps
from ..plant.base import BasePlant
from ..plant.interrupts import uninterrupted
from ..plant.masks import checked
from ..structure.groups import Group, widths_of
from ..structure.saying import printable, warn
from ..structure.surroundings import plainly
from . import following
from .ending import finish
from .ends import Bound
from .history import History
from .run import Run
from .saved import restore, state_of
from .telling import line, numbers
from .together import Together

__all__ = ["Controller", "Cost"]


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


def at_work(run: Run, what: str) -> Run:
    """RuntimeError if it was ended; `what` was called."""
    if not run.live:
        raise RuntimeError(f"{what}: this controller was finalized or detached; attach a new one")
    return run


@dataclass(repr=False, eq=False)
class Controller(Bound):
    """A run under control. `step(loss)` after `optimizer.step()`; `finalize()` at the end."""

    _run: Run
    _together: Together

    # --- what the user reads --------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        return self._run.plant.model

    @property
    def plant(self) -> BasePlant:
        """The model and optimizer as they are laid out now."""
        return self._run.plant

    @property
    def groups(self) -> tuple[Group, ...]:
        return self._run.problem.structure.groups

    @property
    def masks(self) -> dict[str, Tensor]:
        """Copies: changing one changes nothing; use `set_masks`."""
        return {g.name: m.clone() for g, m in zip(self.groups, self.plant.masks, strict=True)}

    @property
    def history(self) -> History:
        return self._run.history

    @property
    def steps(self) -> int:
        """How often `step` was called."""
        return self._run.steps

    @property
    def skipped(self) -> int:
        """Steps whose loss or gradients were not finite, or that the optimizer skipped."""
        run = self._run
        if run.live and run.replicas.alone:
            run.read()
        return run.intake.skipped

    @property
    def overhead_seconds(self) -> float:
        """Process CPU time spent in the controller so far."""
        return self._run.overhead

    def cost(self) -> dict[str, Cost]:
        """Realised use of the budgeted resources, counted on the active units."""
        run, problem = self._run, self._run.problem
        use = run.policy.realised(widths_of(self.plant.masks))
        units = {**UNITS, **{own.name: own.unit for own in run.terms.budget.own}}
        now = {
            k: (use[k] * problem.dense[k], problem.dense[k]) for k in problem.costs if k not in problem.totals
        }
        spent, whole = run.metering.accounts.used(), run.metering.accounts.dense()
        now |= {name: (spent[name], whole[name]) for name in spent}
        return {
            name: Cost(value, dense, units[name], value / problem.batch if name == "flops" else None)
            for name, (value, dense) in now.items()
        }

    @property
    def budget(self) -> Budget | Price:
        """What is asked for. It may be set during the run, tighter or looser."""
        return self._run.terms.budget

    @budget.setter
    def budget(self, budget: Budget | Price) -> None:
        run = at_work(self._run, "budget")
        require_budget(budget)
        run.retarget(budget, self.total_steps)

    @property
    def total_steps(self) -> int:
        """The horizon, in calls of `step`. It may be set during the run: the plan is then that far along."""
        return self._run.problem.total_steps

    @total_steps.setter
    def total_steps(self, steps: int) -> None:
        run = at_work(self._run, "total_steps")
        require_steps(steps)
        if steps < self.steps:
            raise ValueError(
                f"total_steps={steps}: {self.steps} are done already; give at least as many, or finalize()"
            )
        run.retarget(self.budget, steps)

    @property
    def live(self) -> bool:
        """Is it at work still, neither finalized nor detached?"""
        return self._run.live

    def metrics(self) -> dict[str, float]:
        """The last update as flat numbers, for any logger: "flops/use", "flops/price", "units/active", …"""
        return {**numbers(self.history), "steps/skipped": float(self._run.intake.skipped)}

    def on_update(self, listener: Callable[[Controller], object]) -> Callable[[], None]:
        """Call `listener(controller)` after every update from now on; what comes back ends that."""

        def told(run: Run) -> None:
            listener(self)

        self._run.listeners.append(told)
        return lambda: self._run.listeners.remove(told)

    def __repr__(self) -> str:
        refused = len(self._run.problem.structure.refused)
        ended = "" if self.live else "ended; "
        return f"Controller({ended}{line(self.history)}; {len(self.groups)} groups, {refused} refused)"

    def report(self) -> str:
        """Groups, what is refused and why, and what the policy has to say."""
        run, structure = self._run, self._run.problem.structure
        lines = [f"{len(self.groups)} groups, {len(structure.refused)} refused"]
        for group, mask in zip(self.groups, self.plant.masks, strict=True):
            bound = self.plant.error_bounds.get(group.name)
            added = "" if bound is None else f"; 2 Σσ of its cuts {bound:.3g}"
            lines.append(
                f"  {group.name}: {int(mask.sum())} of {group.size} {group.kind} units active{added}"
            )
        lines += [f"  refused {r.name} ({r.size}): {r.reason}" for r in structure.refused]
        lines.append(f"  traced and checked in {structure.forwards} forward passes")
        lines += [f"  {line}" for line in run.policy.describe()]
        lines.append(f"  {run.layouts}")
        lines.append(f"  {self.steps} steps, {self.skipped} skipped; overhead {run.overhead:.2f} s CPU")
        lines += run.replicas.describe()
        return printable("\n".join(lines))

    # --- the loop -------------------------------------------------------------------------------

    def step(self, loss: Tensor | float | None = None) -> None:
        """A training step with this loss is done. Call it after `optimizer.step()`.

        `loss`: None where a framework does not give it: what the optimizer's closure returned, or unknown.
        It may be called for each of several batches whose gradients accumulate, or once for all of them. Of a
        loop without an optimizer it reads the gradients, so there it comes before `zero_grad`.
        """
        run = at_work(self._run, "step")
        if run.steps == run.history.total_steps:
            warn(
                f"controlprune: step {self.steps + 1} is past total_steps={self.steps}; the masks hold from "
                "here on",
            )
        run.step(loss)

    def replicate(self, ddp: nn.Module) -> None:
        """`ddp` is DistributedDataParallel around the model: its ranks decide together from here on."""
        self._together.replicate(ddp)

    def count_forward(self) -> None:
        """A forward pass of the dense model beside the training, a teacher's: `train_flops` has it too."""
        self._run.metering.accounts.beside(1.0)

    # --- by hand --------------------------------------------------------------------------------

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Exactly these masks until the next update; groups that are not named keep theirs."""
        run = at_work(self._run, "set_masks")
        if not isinstance(masks, Mapping):
            raise TypeError(f"masks={type(masks).__name__}: give a mapping from group name to a bool tensor")
        structure, names = run.problem.structure, run.problem.structure.names
        unknown = [name for name in masks if name not in names]
        if unknown:
            raise ValueError(f"masks: no group is called {unknown[0]!r}; the groups are {', '.join(names)}")
        now = dict(zip(names, self.plant.masks, strict=True))
        wanted = checked([masks.get(name, now[name]) for name in names], structure)
        for group, asked, can in zip(self.groups, wanted, self.plant.project(wanted), strict=True):
            if not group.returns and not torch.equal(asked, can):
                raise ValueError(
                    f"masks: {group.name!r} cannot have this mask, the nearest has {int(can.sum())} on; its "
                    "units go from the last one, and never come back"
                )
        run.relayout(wanted, self.plant.compact)

    def shrink(self) -> None:
        """Take dormant units out of the tensors, now."""
        run = at_work(self._run, "shrink")
        run.relayout(run.plant.masks, True)

    def expand(self) -> None:
        """Put them back, exactly; they stay dormant."""
        run = at_work(self._run, "expand")
        masks = run.plant.masks
        if gone := [g.name for g, m in zip(self.groups, masks, strict=True) if not (g.returns or m.all())]:
            raise ValueError(
                f"expand: units of {', '.join(gone)} were truncated away, in a basis that is no longer "
                "there; they never come back"
            )
        run.relayout(masks, False)

    @plainly
    def follow(self, model: nn.Module) -> None:
        """Keep a copy of the model (an average of its weights, say) at the same units and layout.

        `model`: a copy of the attached one, such as `AveragedModel(m).module`, made when dense or as it is
        now. Followers are saved with the controller, in their order; they may be given before it is loaded or
        after.
        """
        run = at_work(self._run, "follow")
        if not all(group.returns for group in self.groups):
            raise ValueError(
                "follow: states are cut in another basis each time, in which an average with older weights "
                "means nothing; begin the average when the states are cut"
            )
        following.follow(run, model)

    # --- the end --------------------------------------------------------------------------------

    @uninterrupted
    @plainly
    def finalize(self, into: nn.Module | None = None) -> nn.Module:
        """The same model object, plain, dense and small, inside the budget; the optimizer stays valid.

        `into`: where the parameters are sharded, a plain dense model of the same class, on every rank: it
        gets the gathered weights and becomes the small one; the sharded model stays masked, without hooks.
        Without it, FSDP2's model itself becomes small and stays sharded.
        """
        return finish(at_work(self._run, "finalize"), into)

    @uninterrupted
    def detach(self) -> nn.Module:
        """The model as it was found: dense, with all learned weights, no hooks."""
        run = at_work(self._run, "detach")
        for plant in (run.plant, *run.followers):
            plant.release()
        run.replicas.reshaped()
        run.close()
        return run.plant.model

    # --- saved and restored ---------------------------------------------------------------------

    def sync(self) -> None:
        """Read the steps since the last update now, on every rank: call it before only one rank saves."""
        at_work(self._run, "sync").read()

    def state_dict(self) -> dict[str, Any]:
        """Everything the loop needs to go on as if it had not stopped: plain containers, a copy."""
        return state_of(at_work(self._run, "state_dict"))

    @uninterrupted
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume. The state must come from a controller of the same model; nothing changes if it does not."""
        restore(at_work(self._run, "load_state_dict"), state)
