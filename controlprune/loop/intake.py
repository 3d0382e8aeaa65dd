"""The intake: what the user's steps bring, with one verdict on each.

    optimizer.step()   (its pre-hook)   gradients are there; the gate gradients are read, if asked for
    controller.step(L)                  the loss; the step joins the unread
    unread(), accept(…)                 all unread steps, in order: on a GPU one synchronisation for all

A step is **good** if the optimizer ran and its loss and gate gradients are finite. Any other is counted as
skipped, and after `REPEATED` in a row the user is told, once per streak. Between the two calls the losses and
verdicts of many replicas may be averaged: the loss is then the mean, and all of them must have run.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..plant.plant import Plant

__all__ = ["Intake", "Step"]

REPEATED = 10
PATIENCE = 8  # steps that wait to be read together


@dataclass(frozen=True)
class Step:
    """One step, read: its loss, its verdict, the gate gradients if they were read (NaN: unit absent)."""

    loss: float  # the mean over all replicas
    own: float  # on this one
    good: bool
    row: Tensor | None


@dataclass
class Unread:
    loss: Tensor
    ran: bool
    row: Tensor | None
    live: tuple[Tensor, ...] | None  # the masks when it was read, where the others are absent


class Intake:
    """Collects steps between two readings."""

    def __init__(self, plant: Plant) -> None:
        self.plant = plant
        self.skipped = 0
        self.bad_in_a_row = 0
        self._ran = False  # the optimizer, since the last step
        self._gradients = True  # there were some when it ran
        self._row: Tensor | None = None
        self._live: tuple[Tensor, ...] | None = None
        self._unread: list[Unread] = []

    def before_step(self, optimizer: Optimizer, *, read: bool) -> None:
        """The optimizer is about to run."""
        self._ran, self._gradients, self._row = True, self.plant.has_gradients, None
        if self._gradients and read:
            self._row = _unscaled(self.plant.gate_gradient(), optimizer)
            self._live = self.plant.masks if self.plant.compact else None

    def after_step(self, loss: object) -> bool:
        """The step is over; should it be read now? On the host reading is cheap, but rows take memory."""
        value = _scalar(loss)
        if self._ran and not self._gradients:
            raise RuntimeError(
                "step: no parameter of the prunable layers had a gradient when optimizer.step() ran; call "
                "loss.backward() before it, zero_grad() after it, and train the model that is attached"
            )
        self._unread.append(Unread(value, self._ran, self._row, self._live))
        self._ran, self._row = False, None
        full = self._unread[-1].row is not None or len(self._unread) >= PATIENCE
        return full and value.device.type == "cpu"

    def without_data(self) -> None:
        """A step of the other replicas, for which this one had no data."""
        self._unread.append(Unread(torch.zeros(()), True, None, None))

    def unread(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the n unread steps, oldest first: losses (n), verdicts (n: the optimizer ran), rows (k, U)."""
        n = len(self._unread)
        losses = torch.stack([u.loss.float() for u in self._unread]).cpu() if n else torch.zeros(0)
        rows = [u.row for u in self._unread if u.row is not None]
        ran = torch.tensor([float(u.ran) for u in self._unread])
        return losses, ran, torch.stack(rows).cpu() if rows else torch.zeros(0, sum(self._sizes))

    def accept(self, own: Tensor, losses: Tensor, ran: Tensor, rows: Tensor) -> list[Step]:
        """The unread steps: losses and verdicts as all replicas see them, and what `unread` gave here."""
        finite, seen = iter(rows.isfinite().all(1).tolist()), iter(rows)
        steps: list[Step] = []
        columns = zip(self._unread, own.tolist(), losses.tolist(), ran.tolist(), strict=True)
        for unread, mine, loss, share in columns:
            good, row = share == 1.0 and math.isfinite(loss), None
            if unread.row is not None:
                good, row = next(finite) and good, _as_observed(next(seen), unread.live)
            self._count(good)
            steps.append(Step(loss, mine, good, row))
        self._unread.clear()
        return steps

    @property
    def _sizes(self) -> tuple[int, ...]:
        return self.plant.structure.sizes

    def state_dict(self) -> list[dict[str, Any]]:
        """The unread steps (none but among replicas, which read together)."""
        return [
            {
                "loss": float(u.loss),
                "ran": u.ran,
                "row": None if u.row is None else u.row.cpu(),
                "live": None if u.live is None else torch.cat(u.live),
            }
            for u in self._unread
        ]

    def load_state_dict(self, state: list[Mapping[str, Any]]) -> None:
        units = sum(self._sizes)
        found = []
        for entry in state:
            row, live = entry["row"], entry["live"]
            if any(x is not None and x.shape != (units,) for x in (row, live)):
                raise ValueError(f"an unread step is not of {units} units")
            masks = None if live is None else live.bool().split(self._sizes)
            found.append(Unread(torch.tensor(float(entry["loss"])), bool(entry["ran"]), row, masks))
        self._unread = found

    def _count(self, good: bool) -> None:
        if good:
            self.bad_in_a_row = 0
            return
        self.skipped += 1
        self.bad_in_a_row += 1
        if self.bad_in_a_row == REPEATED:
            warnings.warn(
                f"controlprune: {REPEATED} steps in a row were not observed (loss or gradients not finite, "
                "or the optimizer skipped them); the masks hold until one is good",
                stacklevel=6,
            )


def _as_observed(row: Tensor, live: tuple[Tensor, ...] | None) -> Tensor:
    """Gate gradients with NaN where a unit is absent."""
    return row if live is None else row.masked_fill(~torch.cat(live), math.nan)


def _scalar(loss: object) -> Tensor:
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise ValueError(f"loss has shape {tuple(loss.shape)}: give the scalar that was differentiated")
        return loss.detach().reshape(())
    if isinstance(loss, (int, float)) and not isinstance(loss, bool):
        return torch.tensor(float(loss))
    raise TypeError(f"loss={type(loss).__name__}: give the scalar loss tensor of this step")


def _unscaled(row: Tensor, optimizer: Optimizer | None) -> Tensor:
    """As if a GradScaler had unscaled the gradients: fused optimizers do that inside their step.

    NaN, hence not observed, where they are about to skip it.
    """
    scale, overflow = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if isinstance(overflow, Tensor):
        row = torch.where(overflow.to(row.device) > 0, math.nan, row)
    return row / scale.to(row.device) if isinstance(scale, Tensor) else row
