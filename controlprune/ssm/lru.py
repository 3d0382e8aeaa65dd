"""The linear recurrent unit.

    x_t = Λ x_{t−1} + Γ B u_t,   y_t = Re(C x_t) + D u_t          u: [batch, T, H], x: complex of N
    λ = exp(−e^ν + iθ)           stable for every ν; a real pole is θ = 0, no logarithm of it is taken
    γ = √(1 − |λ|²)              the state has unit variance for white input; tied to ν, not a parameter

so that (ν, θ, B, C) and the system (Λ, Γ B, C) are one to one. As the output is real, phases in (π, 2π) are
those in (0, π) again. Source: Orvieto et al., "Resurrecting recurrent neural networks for long sequences"
(2023).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .layer import System
from .scan import linear_scan

__all__ = ["LRU", "Bidirectional"]

FASTEST = 1e-30  # |λ| of a state that forgets at once, for the logarithm


class LRU(nn.Module):
    """Complex diagonal recurrence from `features` inputs through `states` states to `features` outputs.

    Poles start uniform on the ring `radius` (in area), phases uniform in [0, `phase`]. Input and output are
    [batch, T, features]; D is diagonal.
    """

    real_output = True

    def __init__(
        self,
        features: int,
        states: int,
        *,
        radius: tuple[float, float] = (0.9, 0.999),
        phase: float = 2 * math.pi,
    ) -> None:
        super().__init__()
        low, high = radius
        if not 0 <= low < high < 1:
            raise ValueError(f"radius={radius}: give two numbers, 0 ≤ low < high < 1")
        size = torch.rand(states) * (high**2 - low**2) + low**2
        self.nu = nn.Parameter(torch.log(-0.5 * size.log()))
        self.theta = nn.Parameter(phase * torch.rand(states))
        self.B = nn.Parameter(torch.randn(states, features, 2) / math.sqrt(2 * features))
        self.C = nn.Parameter(torch.randn(features, states, 2) / math.sqrt(states))
        self.D = nn.Parameter(torch.randn(features))

    @property
    def states(self) -> int:
        return len(self.nu)

    def extra_repr(self) -> str:
        return f"{len(self.D)}, states={self.states}"

    def system(self) -> System:
        poles = torch.polar(torch.exp(-self.nu.exp()), self.theta)
        return poles, self._entry(), torch.view_as_complex(self.C)

    def parameters_for(self, A: Tensor, B: Tensor, C: Tensor) -> Mapping[str, Tensor]:
        rate = -A.abs().clamp_min(FASTEST).log()
        gamma = (-torch.expm1(-2 * rate)).sqrt()
        return {
            "nu": rate.log(),
            "theta": A.angle(),
            "B": torch.view_as_real(B / gamma[:, None]),
            "C": torch.view_as_real(C),
        }

    def forward(self, u: Tensor) -> Tensor:
        u = u.movedim(-2, 0)
        poles, B, _ = self.system()
        enters = torch.view_as_real(B).transpose(1, 2).flatten(0, 1)  # [2N, H], real and imaginary in turn
        driven = nn.functional.linear(u, enters).unflatten(-1, (-1, 2))
        x = linear_scan(poles.expand(1, *u.shape[1:-1], -1), torch.view_as_complex(driven))
        leaves = (self.C * self.C.new_tensor([1.0, -1.0])).flatten(1)  # [H, 2N]
        y = nn.functional.linear(torch.view_as_real(x).flatten(-2), leaves) + self.D * u
        return y.movedim(0, -2)

    def step(self, u: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One time step: y and the new state, from u [batch, features] and the state before."""
        poles, B, C = self.system()
        driven = u.to(B.dtype) @ B.T
        x = driven if x is None else poles * x + driven
        return (x @ C.T).real + self.D * u, x

    def _entry(self) -> Tensor:
        gamma = (-torch.expm1(-2 * self.nu.exp())).sqrt()
        return torch.view_as_complex(self.B * gamma[:, None, None])


class Bidirectional(nn.Module):
    """y = forward(u) + the same from the end, by two layers with states and values of their own."""

    def __init__(self, forward: nn.Module, backward: nn.Module) -> None:
        super().__init__()
        self.ahead, self.back = forward, backward

    def forward(self, u: Tensor) -> Tensor:
        return self.ahead(u) + self.back(u.flip(-2)).flip(-2)
