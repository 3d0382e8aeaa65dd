"""Units by hand: the groups of a network, what a gate's gradient is, what widths cost, and how to cut.

With `w` the columns that read unit i of a group and `g = ∂L/∂w`,

    ∂L/∂gate_i = Σ ⟨w, g⟩,   ‖w‖² = Σ ⟨w, w⟩        over all columns that read it
    FLOPs(n)   = Σ_operators coefficient × Π size(factor)(n)

Vectors are per group and run over the units of the dense network; of units that are gone they hold NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import controlprune as cp
from controlprune.structure.extents import keep, labels, size

from .task import Example

__all__ = ["Units"]


class Units:
    """The groups of `model`, which is cut by `cut` and by nothing else."""

    def __init__(self, model: nn.Module, optimizer: Optimizer | None, example: Example) -> None:
        self.model, self.optimizer, self.example = model, optimizer, example
        self.structure = cp.trace(model, example).structure
        self.sizes = self.structure.sizes
        self.masks = [torch.ones(n, dtype=torch.bool) for n in self.sizes]
        self.steps = [min(8, max(1, n // 32)) for n in self.sizes]  # widths go in these
        self._columns = self._labelled()

    def _labelled(self) -> list[list[tuple[str, int, Tensor]]]:
        """Per group: the tensors that read it, along which dimension, and whose each position is."""
        found = []
        for number, group in enumerate(self.structure.groups):
            parts = group.readers
            live = [keep(part.extent, self.masks) for part in parts]
            units = [labels(part.extent, number)[k] for part, k in zip(parts, live, strict=True)]
            found.append([(p.tensor, p.dim, u) for p, u in zip(parts, units, strict=True)])
        return found

    @property
    def widths(self) -> list[int]:
        return [int(mask.sum()) for mask in self.masks]

    def flops(self, widths: Sequence[int] | None = None) -> float:
        """Of one forward pass of the example; `None`: as it is now."""
        widths = self.widths if widths is None else widths
        return float(
            sum(w.coefficient * math.prod(size(f, widths) for f in w.factors) for w in self.structure.work)
        )

    @property
    def share(self) -> float:
        """FLOPs now, fraction of dense."""
        return self.flops() / self.flops(self.sizes)

    def gate_gradients(self) -> list[Tensor]:
        """Where every reader has its gradient."""
        named = dict(self.model.named_parameters())
        return self._summed({n: p.detach() * p.grad for n, p in named.items() if p.grad is not None})

    def norms(self) -> list[Tensor]:
        """‖w‖² of what reads each unit."""
        return self._summed({n: p.detach() ** 2 for n, p in self.model.named_parameters()})

    def _summed(self, products: dict[str, Tensor]) -> list[Tensor]:
        found = []
        for n, mask, columns in zip(self.sizes, self.masks, self._columns, strict=True):
            total = torch.zeros(n)
            for name, dim, units in columns:
                if name in products:
                    x = products[name]
                    flat = x.sum(dim=[d for d in range(x.dim()) if d != dim])
                    own = units >= 0
                    total.index_add_(0, units[own], flat[own])
            found.append(total.masked_fill(~mask, math.nan))
        return found

    def cut(self, masks: Sequence[Tensor]) -> None:
        """Take the other units out of the tensors, and of the optimizer's state, for good."""
        now = dict(zip(self.structure.names, self.masks, strict=True))
        new = dict(zip(self.structure.names, masks, strict=True))
        if all(torch.equal(now[name], new[name]) for name in now):
            return
        optimizer = self.optimizer or torch.optim.SGD(self.model.parameters(), lr=0.0)
        training = self.model.training
        controller = cp.attach(
            self.model, optimizer, budget=cp.Budget(flops=1.0), example_inputs=self.example, total_steps=10**6
        )
        controller.set_masks({name: new[name][now[name]] for name in controller.masks})
        controller.shrink()
        controller.finalize()
        self.model.train(training)
        self.masks = [mask.clone() for mask in masks]
        self._columns = self._labelled()
