"""The intake: what the user's steps bring, with one verdict on each.

    optimizer.step()   (its pre-hook)   gradients are there; the gate gradients are read, if asked for
    controller.step(L)                  the loss; the step joins the unread
    read()                              all unread steps, in order: on a GPU one synchronisation for all

A step is **good** if the optimizer ran and its loss and gate gradients are finite. Any other is counted as
skipped, and after `REPEATED` in a row the user is told, once per streak.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from .masking import Plant

__all__ = ["Intake", "Step"]

REPEATED = 10


@dataclass(frozen=True)
class Step:
    """One step, read: its loss, its verdict, the gate gradients if they were read (NaN: unit absent)."""

    loss: float
    good: bool
    row: Tensor | None


class Intake:
    """Collects steps between two readings."""

    def __init__(self, plant: Plant) -> None:
        self.plant = plant
        self.skipped = 0
        self.bad_in_a_row = 0
        self._ran = False  # the optimizer, since the last step
        self._gradients = True  # there were some when it ran
        self._row: Tensor | None = None
        self._unread: list[tuple[Tensor, bool, Tensor | None]] = []

    def before_step(self, optimizer: Optimizer, *, read: bool) -> None:
        """The optimizer is about to run."""
        self._ran, self._gradients, self._row = True, self.plant.has_gradients, None
        if self._gradients and read:
            self._row = _unscaled(self.plant.gate_gradient(), optimizer)

    def after_step(self, loss: object) -> bool:
        """The step is over; is its loss on the host, where reading costs nothing?"""
        value = _scalar(loss)
        if self._ran and not self._gradients:
            raise RuntimeError(
                "step: no parameter of the prunable layers had a gradient when optimizer.step() ran; call "
                "loss.backward() before it, zero_grad() after it, and train the model that is attached"
            )
        self._unread.append((value, self._ran, self._row))
        self._ran, self._row = False, None
        return value.device.type == "cpu"

    def read(self) -> list[Step]:
        """The unread steps, oldest first."""
        losses = torch.stack([loss.float() for loss, _, _ in self._unread]).tolist() if self._unread else []
        rows = [row for _, _, row in self._unread if row is not None]
        seen = iter(self._as_observed(torch.stack(rows).cpu()) if rows else ())
        steps: list[Step] = []
        for loss, (_, ran, row) in zip(losses, self._unread, strict=True):
            row, finite = (None, True) if row is None else next(seen)
            good = ran and finite and math.isfinite(loss)
            self._count(good)
            steps.append(Step(loss, good, row))
        self._unread.clear()
        return steps

    def _as_observed(self, rows: Tensor) -> list[tuple[Tensor, bool]]:
        """Rows of gate gradients with NaN where a unit is absent, and whether they were finite otherwise."""
        finite = rows.isfinite().all(1).tolist()
        if self.plant.compact:
            rows = rows.masked_fill(~torch.cat(self.plant.masks), math.nan)
        return list(zip(rows, finite, strict=True))

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
                stacklevel=5,
            )


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
