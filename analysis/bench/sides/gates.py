"""Learned gates with a Lagrangian on FLOPs: the recipe of CoFi (arXiv 2204.00408), written small.

A gate z_i ∈ [0, 1] per unit scales the columns that read it; hard-concrete with log α_i (arXiv 1712.01312):

    s = σ((log u − log(1 − u) + log α)/β),  z = clip(s (ζ − γ) + γ, 0, 1)        β = 2/3, γ = −0.1, ζ = 1.1
    E[z > 0] = σ(log α − β log(−γ/ζ))
    minimise over weights and α, maximise over λ:   L + λ₁ (C − t) + λ₂ (C − t)²

C is the FLOPs at the expected widths, fraction of dense, and t goes down to the budget in the first half of
the gates' time. After it the gates at u = 1/2 are folded into the weights, the units least likely to be open
leave until the budget is met exactly, and the rest of the run fine-tunes. The gates' steps run dense and
count as that.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from controlprune.structure.extents import groups_in, labels, size

from ..allocation import chosen
from ..units import Units
from .side import Run, Side

__all__ = ["Gates"]

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
OPEN = 3.0  # log α at first: nine in ten gates are wide open
RATE = 0.1  # of log α and λ; at the published 0.01 they hardly move in runs of some hundred steps


class Gates(Side):
    """`until` this part of the run the gates are learned."""

    def __init__(self, until: float = 0.5) -> None:
        self.until = until

    def begin(self, run: Run) -> None:
        super().begin(run)
        with run.clock.paused():
            self.units = Units(run.model, run.optimizer, run.example)
        self.alphas = [torch.full((n,), OPEN, requires_grad=True) for n in self.units.sizes]
        self.prices = torch.zeros(2, requires_grad=True)
        self.gates = torch.optim.Adam([*self.alphas, self.prices], lr=RATE)
        self.last = round(self.until * run.steps)
        self.read = [
            (part.tensor, part.dim, number, labels(part.extent, number))
            for number, group in enumerate(self.units.structure.groups)
            for part in group.readers
        ]

    @property
    def share(self) -> float:
        return self.units.share

    def loss(self, model: nn.Module, batch: Any, step: int) -> Tensor:
        if step >= self.last:
            return super().loss(model, batch, step)
        weights = self._scaled([_sampled(alpha) for alpha in self.alphas])

        def gated(*args: Any, **kwargs: Any) -> Any:
            return functional_call(model, weights, args, kwargs)

        way = min(1.0, 2 * step / max(1, self.last))
        over = self._expected() - (1.0 - (1.0 - self.run.budget) * way)
        loss = self.run.task.loss(gated, batch)
        return loss + self.prices[0] * over + self.prices[1] * over**2

    def after(self, step: int, loss: Tensor) -> None:
        if step > self.last:
            return
        assert self.prices.grad is not None
        self.prices.grad.neg_()
        self.gates.step()
        self.gates.zero_grad()
        with torch.no_grad():
            self.prices.clamp_(min=0.0)
        if step == self.last:
            with torch.no_grad(), self.run.clock.paused():
                self._cut()

    def _cut(self) -> None:
        self.run.notes["expected"] = float(self._expected())
        named = dict(self.run.model.named_parameters())
        for name, weight in self._scaled(
            [_gate(alpha, torch.zeros_like(alpha)) for alpha in self.alphas]
        ).items():
            named[name].copy_(weight)
        self.units.cut(chosen(self.units, [_open(a) for a in self.alphas], self.run.budget, "global"))

    def _scaled(self, gates: list[Tensor]) -> dict[str, Tensor]:
        """The tensors that read units, each column times the gate of what it reads."""
        named = dict(self.run.model.named_parameters())
        weights: dict[str, Tensor] = {}
        for name, dim, number, units in self.read:
            factor = torch.where(units >= 0, gates[number][units.clamp_min(0)], 1.0)
            shape = [1] * named[name].dim()
            shape[dim] = -1
            weights[name] = weights.get(name, named[name]) * factor.view(shape)
        return weights

    def _expected(self) -> Tensor:
        """C at the expected widths."""
        widths = [_open(alpha).sum() for alpha in self.alphas]
        total = torch.zeros(())
        for work in self.units.structure.work:
            product = torch.tensor(float(work.coefficient))
            for factor in work.factors:
                product = product * self._length(factor, widths)
            total = total + product
        return total / self.units.flops(self.units.sizes)

    def _length(self, extent: Any, widths: list[Tensor]) -> Tensor:
        """Expected size of a dimension. Those of the bench's networks have one group, if any."""
        inside, whole = groups_in(extent), float(size(extent, self.units.sizes))
        if not inside:
            return torch.tensor(whole)
        (group,) = inside
        return widths[group] * (whole / self.units.sizes[group])


def _sampled(alpha: Tensor) -> Tensor:
    u = torch.rand_like(alpha).clamp(1e-6, 1 - 1e-6)
    return _gate(alpha, u.log() - (1 - u).log())


def _gate(alpha: Tensor, noise: Tensor) -> Tensor:
    return (torch.sigmoid((noise + alpha) / BETA) * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def _open(alpha: Tensor) -> Tensor:
    return torch.sigmoid(alpha - BETA * math.log(-GAMMA / ZETA))
