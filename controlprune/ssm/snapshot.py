"""All of a model and its optimizer as they are now, to go back to: tensors, their shapes, optimizer state."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..plant.layout import set_data

__all__ = ["Snapshot"]


class Snapshot:
    """A copy of every parameter, every buffer (BatchNorm's too) and all optimizer state."""

    def __init__(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        self.model, self.optimizer = model, optimizer
        self._tensors = [(t, t.detach().clone()) for t in self._all()]
        self._states: dict[Tensor, dict[str, Any]] = {}
        if optimizer is not None:
            self._states = {p: _copied(entries) for p, entries in optimizer.state.items()}

    def restore(self) -> None:
        """Everything as it was: tensors are the same objects, with the shapes and values of then."""
        with torch.no_grad():
            for tensor, then in self._tensors:
                tensor.grad = None
                if tensor.shape == then.shape:
                    tensor.copy_(then)
                else:
                    set_data(tensor, then.clone())
        if self.optimizer is not None:
            self.optimizer.state.clear()
            self.optimizer.state.update({p: _copied(entries) for p, entries in self._states.items()})

    def _all(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]


def _copied(entries: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in entries.items()}
