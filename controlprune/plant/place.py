"""One parameter whose entries are units, or belong to them (plant/entries.py): what masking it is.

`m` is −1 (all bits) or 0, one integer an entry on the parameter's device: masking is a bitwise AND, for which
NaN and inf are zero like any other. A mask of up to `WIDE` entries is as wide as its weights, so that nothing
is converted on the way; a larger one takes a byte an entry.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..structure.groups import Group
from .base import Kind

__all__ = ["Place", "dense", "mask_like", "silence_"]

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
WIDE = 2**20  # where a step is short, the AND shows in it: 22 µs on 235,200 weights, 37 with a byte an entry


def mask_like(weights: Tensor) -> Tensor:
    """Room for a mask of these weights."""
    wide = BITS.get(weights.element_size(), torch.int8)
    kind = wide if weights.numel() <= WIDE else torch.int8
    return torch.empty_like(weights, dtype=kind, requires_grad=False)


def silence_(tensor: Tensor, keep: Tensor) -> None:
    """Zero where `keep` is 0, the same bits where it is −1; in place, unseen by autograd."""
    if tensor.layout == torch.sparse_coo:  # rows of an embedding
        tensor, keep = tensor._values(), keep[tensor._indices()[0]]
    bits = BITS.get(tensor.element_size())
    if bits is None:  # complex128
        tensor.data.mul_(keep.bool())
    elif keep.element_size() > tensor.element_size():
        tensor.data.view(bits).bitwise_and_(keep.to(bits))
    else:
        tensor.data.view(bits).bitwise_and_(keep)


@dataclass
class Place:
    """One parameter whose entries are units, or belong to them."""

    group: Group
    parameter: nn.Parameter
    keep: Tensor | None = None  # None: every unit is on
    version: int = -1  # of the weights, when they were last known to be masked
    known: Callable[[], Tensor | None] = lambda: None  # the gradient that is masked
    grad_version: int = -1
    aside: Tensor | None = None  # of dormant entries, Σ over backward passes
    norm: Tensor | None = None  # of the masked gradient, when that was put aside

    def silence_all(self, keep: Tensor, optimizer: Optimizer | None) -> None:
        """Weights, gradient and what the optimizer keeps of each of them."""
        parameter = self.parameter
        silence_(parameter, keep)
        if parameter.grad is not None:
            silence_(parameter.grad, keep)
        for key, value in ({} if optimizer is None else optimizer.state.get(parameter, {})).items():
            alike = isinstance(value, Tensor) and value.shape == parameter.shape
            if alike and value.layout == torch.strided and key != "step_size":
                silence_(value, keep)  # Rprop's step_size is a rate, no momentum: a weight returns with it

    def silence_gradient(self) -> None:
        gradient, keep = self.parameter.grad, self.here
        if gradient is None or keep is None:
            return
        if self.known() is not gradient or gradient._version != self.grad_version:
            silence_(gradient, keep)
            self.known, self.grad_version = weakref.ref(gradient), gradient._version

    def put_aside(self) -> None:
        """What of the gradient is dormant, before it is masked."""
        gradient, keep = self.parameter.grad, self.here
        if gradient is None or keep is None:
            return
        part = gradient.detach().to_dense() if gradient.layout != torch.strided else gradient.detach().clone()
        silence_(part, ~keep)
        self.aside = part if self.aside is None else self.aside + part
        self.known = lambda: None
        self.silence_gradient()
        self.norm = torch.linalg.vector_norm(dense(gradient))

    @property
    def here(self) -> Tensor | None:
        """The mask, where the weights are now."""
        if self.keep is not None and self.keep.device != self.parameter.device:
            self.keep = self.keep.to(self.parameter.device)
        return self.keep

    def gradient(self) -> Tensor | None:
        """∂w of every entry at the scale that `.grad` has now."""
        if self.parameter.grad is None:
            return None
        now = dense(self.parameter.grad)
        if self.aside is None:
            return now
        ratio = 1.0
        if self.norm is not None:
            size = torch.linalg.vector_norm(now)
            ratio = torch.where(self.norm > 0, size / self.norm, 1.0)
        return now + self.aside * ratio

    def seen(self, kind: Kind) -> Tensor | None:
        """What is seen of every entry (`Kind`); None without a gradient."""
        gradient = self.gradient()
        if gradient is None or kind == "entry":
            return gradient
        weights = self.parameter.detach()
        gate = weights * gradient
        if kind == "return" and self.here is not None:
            on = self.here != 0
            size = (weights.square().sum() / on.sum()).sqrt()
            gate = torch.where(on, gate, size * gradient)
        return gate


def dense(gradient: Tensor) -> Tensor:
    return gradient.detach().to_dense() if gradient.layout != torch.strided else gradient.detach()
