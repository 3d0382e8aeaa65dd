"""The intake: what the user's steps bring, with one verdict on each.

    optimizer.step()   (its pre-hook)   gradients are there; the gate gradients are read, if asked for
    controller.step(L)                  the loss, where it is given; the step joins the unread
    unread(), accept(…)                 all unread steps, in order: on a GPU one synchronisation for all

Under a closure gradients are there when it returns: the hook puts a wrapper around it, and what it returns is
the loss of a step that gives none. Where `step` is called for each of several batches whose gradients
accumulate, what was asked for while the optimizer did not run is read when it does (`owed`). Several
optimizers each bring the part of the gradients that they hold.

A step is **good** if the optimizer ran with gradients and its loss (where given) and gate gradients are
finite, **idle** if it did not. Any other is counted as skipped, and after `REPEATED` in a row the user is
told, once per streak. Between the two calls the losses and verdicts of many replicas may be averaged: the
loss is then the mean, and all of them must have run.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..plant.base import BasePlant
from ..plant.joint import stepped
from ..structure.saying import warn
from .cadence import REPEATED, Cadence

__all__ = ["Intake", "Step", "when_closed"]

log = logging.getLogger("controlprune")
PATIENCE, ROWS = 64, 8  # steps that wait to be read together, and of those with gate gradients
ROOM = 2**16  # units: gate gradients of more are read at once, as waiting would take memory


@dataclass(frozen=True)
class Step:
    """One step, read: its loss, its verdict, the gate gradients if they were read (NaN: unit absent)."""

    loss: float  # the mean over all replicas; nan: not given
    own: float  # on this one
    good: bool
    row: Tensor | None


@dataclass(slots=True)
class Unread:
    loss: Tensor | float | None  # a tensor while it is on a device, to be fetched with others
    ran: bool  # the optimizer, with gradients
    row: Tensor | None
    live: tuple[Tensor, ...] | None  # the units that it tells of; None: all


class Intake:
    """Collects steps between two readings."""

    def __init__(self, plant: BasePlant) -> None:
        self.plant = plant
        self.cadence = Cadence()
        self.runs = 0  # of the optimizer, since attach
        self.spoilt = 0  # steps whose loss or gradients were not finite
        self.bad_in_a_row = 0
        self.fresh = False  # was the last step read a good one?
        self.idle = False  # had the last step no new gradients?
        self.told = False  # that some consumers are frozen
        self.owed = False  # gate gradients were asked for and the optimizer has not run since
        self._ran = False  # the optimizer, since the last step
        self._gradients = False  # there were some when it ran
        self._returned: object = None  # by its closure
        self._rows: dict[Optimizer | None, Tensor] = {}
        self._live: tuple[Tensor, ...] | None = None
        self._unread: list[Unread] = []

    @property
    def skipped(self) -> int:
        return self.spoilt + self.cadence.skipped

    def ran(self, optimizer: Optimizer | None, returned: object) -> bool:
        """It (None: the user's own code) is about to run; are there gradients? `returned`: by its closure."""
        gradients = self.plant.has_gradients
        if self._rows:
            self._rows.pop(optimizer, None)
        self._ran, self._gradients, self._returned = True, self._gradients or gradients, returned
        self.runs += 1
        return gradients

    def observe(self, optimizer: Optimizer | None) -> None:
        """Its gradients are read."""
        self._rows[optimizer] = _unscaled(self.plant.gate_gradient(self._part(optimizer)), optimizer)
        self._live = self._heard()

    def _heard(self) -> tuple[Tensor, ...] | None:
        """The units whose gate gradient is known now, None: all. The others are absent, or read by what is
        frozen, which is said once."""
        masks, observable = self.plant.masks, self.plant.observable
        if all(observable):
            return masks if self.plant.compact else None
        if not self.told:
            self.told = True
            names = [n for n, o in zip(self.plant.structure.names, observable, strict=True) if not o]
            listed = ", ".join(map(repr, names[:3])) + (", …" if len(names) > 3 else "")
            log.warning(
                "what reads the units of %s is frozen, so that no gradient tells what they are worth: they "
                "are ranked by the norm of what reads them, and count as much as the average of the others. "
                "To leave them alone, name their layers in ignored_layers",
                listed,
            )
        here = masks if self.plant.compact else [torch.ones_like(mask) for mask in masks]
        return tuple(mask & torch.tensor(o) for mask, o in zip(here, observable, strict=True))

    def _part(self, optimizer: Optimizer | None) -> set[int] | None:
        """The parameters of one of several optimizers."""
        if optimizer is None or optimizer is self.plant.optimizer or len(stepped(self.plant.optimizer)) == 1:
            return None
        return {id(p) for group in optimizer.param_groups for p in group["params"]}

    def passed(self, loss: Tensor | float | None) -> bool:
        """Does the step only join the unread: it is as steps should be, and nothing was asked of it?"""
        if not self._gradients or self.owed or self._rows or len(self._unread) >= PATIENCE - 1:
            return False
        given = _scalar(self._returned if loss is None else loss, strict=loss is not None)
        if not self.cadence.regular():
            return False
        self.idle = False
        self._unread.append(Unread(given, True, None, self._live))
        self._ran, self._gradients, self._returned = False, False, None
        return True

    def after_step(self, loss: object, *, wanted: bool) -> bool:
        """The step is over; should it be read now? On the host reading is cheap, but rows take memory.

        `wanted`: were gate gradients asked for?
        """
        given = _scalar(self._returned if loss is None else loss, strict=loss is not None)
        self.cadence.call(ran=self._ran, gradients=self._gradients)
        self.owed = not self._gradients and (wanted or self.owed)
        row = sum(self._rows.values()) if self._rows else None
        assert row is None or isinstance(row, Tensor)
        self.idle = not (self._ran and self._gradients)
        self._unread.append(Unread(given, not self.idle, row, self._live))
        self._ran, self._gradients, self._returned = False, False, None
        self._rows = {}
        return self._full(given, row)

    def _full(self, given: Tensor | float | None, row: Tensor | None) -> bool:
        if isinstance(given, Tensor) or (row is not None and row.device.type != "cpu"):
            return False  # reading would wait for the device
        if row is None:
            return len(self._unread) >= PATIENCE
        return row.numel() > ROOM or len([u for u in self._unread if u.row is not None]) >= ROWS

    def without_data(self) -> None:
        """A step of the other replicas, for which this one had no data."""
        self._unread.append(Unread(0.0, True, None, None))

    def unread(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the n unread steps, oldest first: losses (n), verdicts (n: the optimizer ran), rows (k, U)."""
        rows = [u.row for u in self._unread if u.row is not None]
        told = [u.loss for u in self._unread if isinstance(u.loss, Tensor)]
        device = next((x.device for x in (*rows, *told)), torch.device("cpu"))
        if device.type != "cpu":
            flat = [x.float().flatten().to(device) for x in (*told, *rows)]
            here = torch.cat(flat).cpu().split([len(x) for x in flat])
            told, rows = list(here[: len(told)]), list(here[len(told) :])
        came = iter(told)
        losses = [next(came) if isinstance(u.loss, Tensor) else u.loss for u in self._unread]
        known = torch.tensor([math.nan if loss is None else float(loss) for loss in losses])
        ran = torch.tensor([float(u.ran) for u in self._unread])
        return known, ran, torch.stack(rows) if rows else torch.zeros(0, sum(self._sizes))

    def accept(self, own: Tensor, losses: Tensor, ran: Tensor, rows: Tensor) -> list[Step]:
        """The unread steps: losses and verdicts as all replicas see them, and what `unread` gave here."""
        finite, seen = iter(rows.isfinite().all(1).tolist()), iter(rows)
        steps: list[Step] = []
        columns = zip(self._unread, own.tolist(), losses.tolist(), ran.tolist(), strict=True)
        for unread, mine, loss, share in columns:
            good, row = share == 1.0 and (unread.loss is None or math.isfinite(loss)), None
            if unread.row is not None:
                good, row = next(finite) and good, _as_observed(next(seen), unread.live)
            if share > 0.0:
                self._count(good)
            self.fresh = good
            steps.append(Step(loss, mine, good, row))
        self._unread.clear()
        return steps

    @property
    def _sizes(self) -> tuple[int, ...]:
        return self.plant.structure.sizes

    def clear(self) -> None:
        """The unread steps were the others' to read."""
        self._unread.clear()

    def state_dict(self) -> dict[str, Any]:
        """With the unread steps (none but among replicas, which read together)."""
        steps = [
            {
                "loss": None if u.loss is None else float(u.loss),
                "ran": u.ran,
                "row": None if u.row is None else u.row.cpu(),
                "live": None if u.live is None else torch.cat(u.live),
            }
            for u in self._unread
        ]
        return {
            "steps": steps,
            "counts": [self.spoilt, self.bad_in_a_row, int(self.owed), int(self.fresh)],
            "cadence": self.cadence.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        units = sum(self._sizes)
        found = []
        for entry in state["steps"]:
            loss, row, live = entry["loss"], entry["row"], entry["live"]
            if any(x is not None and x.shape != (units,) for x in (row, live)):
                raise ValueError(f"an unread step is not of {units} units")
            masks = None if live is None else live.bool().split(self._sizes)
            loss = None if loss is None else float(loss)
            found.append(Unread(loss, bool(entry["ran"]), row, masks))
        spoilt, bad, owed, fresh = (int(n) for n in state["counts"])
        self.cadence.load_state_dict(state["cadence"])
        self.spoilt, self.bad_in_a_row, self.owed, self.fresh = spoilt, bad, bool(owed), bool(fresh)
        self._unread = found

    def _count(self, good: bool) -> None:
        if good:
            self.bad_in_a_row = 0
            return
        self.spoilt += 1
        self.bad_in_a_row += 1
        if self.bad_in_a_row == REPEATED:
            warn(
                f"controlprune: {REPEATED} steps in a row were not observed (loss or gradients not finite, "
                "or the optimizer of another replica skipped them); the masks hold until one is good",
            )


def when_closed(
    args: tuple[Any, ...], kwargs: dict[str, Any], then: Callable[[object], None]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Call `then` when an optimizer that is called with these has its gradients; the arguments to go on with.

    That is now (None: they are as they were), or whenever the closure has returned its loss.
    """
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if not callable(closure):
        then(None)
        return None

    @functools.wraps(closure)
    def closed(*inner: Any, **named: Any) -> Any:
        loss = closure(*inner, **named)
        then(loss)
        return loss

    return (args[0], closed, *args[2:]) if len(args) > 1 else args, (
        kwargs if len(args) > 1 else {**kwargs, "closure": closed}
    )


def _as_observed(row: Tensor, live: tuple[Tensor, ...] | None) -> Tensor:
    """Gate gradients with NaN where a unit is absent."""
    return row if live is None else row.masked_fill(~torch.cat(live), math.nan)


def _scalar(loss: object, *, strict: bool) -> Tensor | float | None:
    """A copy: the user may change the tensor. `strict`: it was given as the loss, and not found."""
    if isinstance(loss, Tensor) and (loss.numel() == 1 or strict):
        if loss.numel() != 1:
            raise ValueError(f"loss has shape {tuple(loss.shape)}: give the scalar that was differentiated")
        return loss.item() if loss.is_cpu else loss.detach().reshape(()).clone()
    if isinstance(loss, Real) and not isinstance(loss, bool):
        return float(loss)
    if strict:
        raise TypeError(
            f"loss={type(loss).__name__}: give the scalar loss tensor of this step, or nothing: step()"
        )
    return None


def _unscaled(row: Tensor, optimizer: Optimizer | None) -> Tensor:
    """As if a GradScaler had unscaled the gradients: fused optimizers do that inside their step.

    NaN, hence not observed, where they are about to skip it.
    """
    scale, overflow = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if isinstance(overflow, Tensor):
        row = torch.where(overflow.to(row.device) > 0, math.nan, row)
    return row / scale.to(row.device) if isinstance(scale, Tensor) else row
