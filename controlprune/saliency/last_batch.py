"""Replay: the last batch once more, with other units on or off, and what the loss would have been.

Calibration needs `L(some units off) − L(as it is)` on one batch. The model and its inputs are at hand
(a one-shot forward hook, armed only before a calibration, records them); the user's loss function is
not. But the output y, its gradient G = ∂L/∂y and the value L were all seen, and for the usual losses
they determine the loss as a function of y:

    cross-entropy      L = Σ_r s_r [lse(y_r) − y_r,t]     G_r = s_r (softmax(y_r) − onehot_t)
    squared error      L = c ‖y − t‖²                     G = 2c (y − t)
    logistic           L = c Σ softplus(y) − t·y          G = c (σ(y) − t)
    the model's own    L is one of the model's outputs

A hypothesis is taken only if it reproduces the value L (relative 1e-3); it is never assumed. Failing
all, the loss is taken in its local metric, L ≈ L₀ + Σ_r ⟨G_r, δ_r⟩ + ½ B Σ_r ⟨G_r, δ_r⟩² with
δ = y − y₀: exact gradient, Fisher curvature. Every form returns one number per row, so a paired
difference comes with its standard error. Batch statistics and random numbers are as they were
afterwards, and both sides of a pair see the same random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..plant.hooks import Link

__all__ = [
    "LOCAL",
    "Batch",
    "Recorder",
    "float_leaves",
    "identify",
    "paired_difference",
    "undisturbed",
]

Rows = Callable[[list[Tensor]], Tensor]
Total = Callable[[Tensor], Tensor]
TOLERANCE = 1e-3
LOCAL = "local metric"


@dataclass
class Batch:
    """One forward call of the user's: inputs, differentiable outputs, their gradients."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]
    gradients: list[Tensor | None] = field(default_factory=list)


def float_leaves(output: Any) -> list[Tensor]:
    return [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]


class Recorder:
    """Records the next forward of `model`, inputs and output gradients, then takes its hook off."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.batch: Batch | None = None
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    @property
    def armed(self) -> bool:
        """Still waiting: no forward pass in training came by (a compiled model knows no late hooks)."""
        return self._handle is not None

    def arm(self) -> None:
        if self._handle is None:
            self.batch = None
            self._handle = self.model.register_forward_hook(Link(self, Recorder._record), with_kwargs=True)

    def disarm(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        leaves = float_leaves(output)
        if not any(x.requires_grad for x in leaves):
            return
        self.disarm()
        batch = Batch(args, kwargs, [x.detach() for x in leaves], [None] * len(leaves))
        for i, leaf in enumerate(leaves):
            if leaf.requires_grad:
                leaf.register_hook(lambda gradient, i=i, batch=batch: _keep(batch, i, gradient))
        self.batch = batch

    def take(self) -> Batch | None:
        """The recorded batch, once."""
        batch, self.batch = self.batch, None
        return batch


def _keep(batch: Batch, i: int, gradient: Tensor) -> None:
    batch.gradients[i] = gradient.detach()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Forward passes inside leave no trace: buffers and random states are put back."""
    buffers = [b for b in model.buffers() if b.numel()]
    before = [b.detach().clone() for b in buffers]
    devices = sorted({b.device.index for b in model.parameters() if b.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


def paired_difference(
    model: nn.Module, batch: Batch, rows: Rows, changes: list[Any], total: Total = lambda sums: sums
) -> list[tuple[float, float]]:
    """(mean, standard error) of L(changed) − L(as is) for each context manager in `changes`.

    `total` adds up over replicas, each with its part of the batch and the mean loss over that part.
    """
    sums: list[list[float]] = []
    with torch.no_grad(), undisturbed(model):
        base = rows(_forward(model, batch))
        for change in changes:
            with change:
                difference = (rows(_forward(model, batch)) - base).double()
            squares = difference.square().sum().item()
            sums.append([1.0, difference.numel(), difference.sum().item(), squares])
    return [_estimate(*row) for row in total(torch.tensor(sums, dtype=torch.float64)).tolist()]


def _estimate(replicas: float, rows: float, summed: float, squares: float) -> tuple[float, float]:
    """Of the loss over all rows (the mean over replicas): its change, and √n times the rows' deviation."""
    change = summed / replicas
    variance = (squares / replicas**2 - change * change / rows) / max(1.0, rows - 1.0)
    return change, math.sqrt(max(0.0, variance) * rows) if variance == variance else math.nan


def _forward(model: nn.Module, batch: Batch) -> list[Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return float_leaves(model(*batch.args, **batch.kwargs))


# --- which loss was it? -------------------------------------------------------------------------


def identify(batch: Batch, loss: float, scale: float = 1.0) -> tuple[str, Rows]:
    """The loss as a function of the outputs, one value per row (they sum to the loss), and its name.

    `scale`: what turns the recorded gradients into those of the loss (1/S under a GradScaler), for the local
    metric; the other forms find it out by themselves.
    """
    for i, output in enumerate(batch.outputs):
        if output.numel() == 1 and _close(output.item(), loss):
            return "model's own", lambda outputs, i=i: outputs[i].reshape(1).float()
    seen = [(i, g) for i, g in enumerate(batch.gradients) if g is not None and batch.outputs[i].dim() > 0]
    if len(seen) == 1:
        i, gradient = seen[0]
        y, g = batch.outputs[i].float(), gradient.float()
        for name, hypothesis in (
            ("cross-entropy", _cross_entropy),
            ("squared error", _squared),
            ("logistic", _logistic),
        ):
            rows = hypothesis(y, g, loss)
            if rows is not None and _close(rows(y).sum().item(), loss):
                return name, lambda outputs, i=i, rows=rows: rows(outputs[i].float())
    return LOCAL, _local(batch, [i for i, _ in seen], scale)


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= TOLERANCE * max(abs(b), 1e-6)


def _cross_entropy(y: Tensor, g: Tensor, loss: float) -> Callable[[Tensor], Tensor] | None:
    """Hard labels, class axis last or first after the batch; rows with G = 0 are ignored ones."""
    for axis in {y.dim() - 1, 1} if y.dim() > 1 else set():
        logits, gradient = (x.movedim(axis, -1).reshape(-1, x.shape[axis]) for x in (y, g))
        target = gradient.argmin(-1)
        p = logits.softmax(-1)
        direction = p - F.one_hot(target, p.shape[-1])
        scale = (gradient * direction).sum(-1) / (direction * direction).sum(-1).clamp_min(1e-20)
        residual = gradient - scale[:, None] * direction
        if residual.norm() > TOLERANCE * gradient.norm():
            continue
        kept = gradient.abs().amax(-1) > 0
        scale = _common(scale, direction.norm(dim=-1) > 1e-2)
        total = F.cross_entropy(logits, target, reduction="none")
        weight = torch.where(kept, scale, 0.0)
        factor = loss / max((weight * total).sum().item(), 1e-20)  # of a GradScaler, say
        if not (_close(factor, 1.0) or _close(factor * weight.sum().item(), 1.0)):
            continue
        weight = weight * factor

        def rows(new: Tensor, axis: int = axis, target: Tensor = target, weight: Tensor = weight) -> Tensor:
            flat = new.movedim(axis, -1).reshape(-1, new.shape[axis])
            return weight * F.cross_entropy(flat, target, reduction="none")

        return rows
    return None


def _common(scale: Tensor, reliable: Tensor) -> Tensor:
    """One scale for all rows if the well-determined ones agree (no class weights)."""
    if not reliable.any():
        return scale
    median = scale[reliable].median()
    agree = ((scale[reliable] - median).abs() <= 10 * TOLERANCE * median.abs()).all()
    return torch.where(agree, median, scale)


def _squared(y: Tensor, g: Tensor, loss: float) -> Callable[[Tensor], Tensor] | None:
    c = (g * g).sum().item() / max(4.0 * loss, 1e-30)
    usual = [1.0 / y.numel(), 1.0 / y.shape[0], 1.0, 0.5 / y.numel(), 0.5 / y.shape[0], 0.5]
    exact = next((u for u in usual if _close(c, u)), None)
    if exact is None:
        return None
    target = y - g / (2.0 * exact)
    return lambda new: exact * ((new - target) ** 2).reshape(new.shape[0], -1).sum(-1)


def _logistic(y: Tensor, g: Tensor, loss: float) -> Callable[[Tensor], Tensor] | None:
    for c in (1.0 / y.numel(), 1.0 / y.shape[0], 1.0):
        target = y.sigmoid() - g / c
        if target.min() < -TOLERANCE or target.max() > 1.0 + TOLERANCE:
            continue

        def rows(new: Tensor, c: float = c, target: Tensor = target) -> Tensor:
            return c * (F.softplus(new) - target * new).reshape(new.shape[0], -1).sum(-1)

        if _close(rows(y).sum().item(), loss):
            return rows
    return None


HYPOTHESES = (("cross-entropy", _cross_entropy), ("squared error", _squared), ("logistic", _logistic))


def _local(batch: Batch, seen: list[int], scale: float) -> Rows:
    def rows(outputs: list[Tensor]) -> Tensor:
        parts: list[Tensor] = []
        for i in seen:
            gradient = batch.gradients[i]
            assert gradient is not None
            delta = (outputs[i] - batch.outputs[i]).float() * (scale * gradient.float())
            along = delta.reshape(delta.shape[0], -1).sum(-1)
            parts.append(along + 0.5 * along.numel() * along * along)
        return torch.cat(parts) if parts else torch.zeros(1)

    return rows
