"""Input-dependent recurrences (Mamba-like) have no Hankel singular values; a rule ranks their states.

    Δ_t = softplus(W_Δ u_t + d),   B_t = W_B u_t,   C_t = W_C u_t      a = −e^rate: [features, N]
    x_t = exp(Δ_t a) x_{t−1} + Δ_t u_t B_tᵀ,   y_t = x_t C_t + D u_t                    x: [features, N]

A and B change with the input, so there is no system whose truncation error could be bounded. What is known
are statistics of forward passes (GHOST, arXiv 2602.11408, ranks the states of Mamba 2 so): a state counts by
how strongly it is excited times how strongly it is read,

    score_n = √(E[x_n²] E[C_n²])        averaged over batch, time, features; with a memory of 1/(1 − β) passes

the diagonal of empirical Gramians. It is a heuristic: no bound is given, and none holds. A cut takes states
out as they are (no change of basis), so weights and the optimizer's moments of what stays are untouched.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.optim import Optimizer

from ..plant.layout import set_data
from .scan import linear_scan

__all__ = ["Selective", "keep_states", "scores_of"]

MEMORY = 0.98  # β: fifty passes


class Selective(nn.Module):
    """[batch, T, features] -> the same; the recurrence at the heart of Mamba, without what is around it."""

    excited: Tensor
    read: Tensor

    def __init__(self, features: int, states: int, *, step: tuple[float, float] = (0.001, 0.1)) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.arange(1, states + 1).float().log().repeat(features, 1))
        self.B = nn.Linear(features, states, bias=False)
        self.C = nn.Linear(features, states, bias=False)
        self.step = nn.Linear(features, features)
        self.D = nn.Parameter(torch.ones(features))
        start = torch.rand(features) * math.log(step[1] / step[0]) + math.log(step[0])
        with torch.no_grad():
            self.step.bias.copy_(start.exp() + torch.log(-torch.expm1(-start.exp())))  # softplus⁻¹
        self.register_buffer("excited", torch.zeros(states))  # E[x²]
        self.register_buffer("read", torch.zeros(states))  # E[C²]

    @property
    def states(self) -> int:
        return self.rate.shape[1]

    def extra_repr(self) -> str:
        return f"states={self.states}"

    def forward(self, u: Tensor) -> Tensor:
        u = u.movedim(-2, 0)
        step, enters, leaves = softplus(self.step(u)), self.B(u), self.C(u)
        decay = torch.exp(-step[..., None] * self.rate.exp())
        x = linear_scan(decay, (step * u)[..., None] * enters[..., None, :])
        if self.training:
            self._watch(x.detach(), leaves.detach())
        y = torch.einsum("...dn,...n->...d", x, leaves) + self.D * u
        return y.movedim(0, -2)

    @torch.no_grad()
    def _watch(self, x: Tensor, leaves: Tensor) -> None:
        for average, seen in ((self.excited, x), (self.read, leaves)):
            now = seen.square().flatten(0, -2).mean(0)
            average.lerp_(now.to(average.dtype), 1 - MEMORY)


def scores_of(layer: Selective) -> Tensor:
    """How much each state was excited and read in recent forward passes in training mode."""
    return (layer.excited * layer.read).sqrt()


def keep_states(layer: Selective, kept: Tensor, optimizer: Optimizer | None = None) -> None:
    """Take all states but `kept` (positions) out of the layer, in place; the optimizer follows."""
    with torch.no_grad():
        for tensor, dim in ((layer.rate, 1), (layer.B.weight, 0), (layer.C.weight, 0)):
            old = tensor.shape
            tensor.grad = None
            entries = {} if optimizer is None else optimizer.state.get(tensor, {})
            for key, value in entries.items():
                if isinstance(value, Tensor) and value.shape == old:
                    entries[key] = value.index_select(dim, kept)
            set_data(tensor, tensor.detach().index_select(dim, kept))
        layer.excited, layer.read = layer.excited[kept], layer.read[kept]
        layer.B.out_features = layer.C.out_features = len(kept)
