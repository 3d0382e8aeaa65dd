"""A filter per feature: S4D, diagonal and in continuous time.

    dx/dt = a x + u,  y = Re(C x) + D u        for every feature h on its own, N complex states
    λ = exp(Δ a),  b = (λ − 1) / a             zero-order hold over the feature's step Δ
    a = −e^decay + i frequency

In training it is a convolution, K_t = Re Σ_n C_n λ_n^t b_n, by FFT; `step` is the recurrence. A state is cut
in all features at once (each by its own system), so that tensors stay rectangular. Source: Gu et al., "On the
parameterization and initialization of diagonal state space models" (2022).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .layer import System

__all__ = ["S4D"]

FASTEST = 1e-30


class S4D(nn.Module):
    """[batch, T, features] -> the same, `states` complex states per feature, started at a_n = −½ + iπn."""

    real_output = True

    def __init__(self, features: int, states: int, *, step: tuple[float, float] = (0.001, 0.1)) -> None:
        super().__init__()
        low, high = map(math.log, step)
        self.log_step = nn.Parameter(torch.rand(features) * (high - low) + low)
        self.decay = nn.Parameter(torch.full((features, states), math.log(0.5)))
        self.frequency = nn.Parameter(math.pi * torch.arange(states).float().repeat(features, 1))
        self.C = nn.Parameter(torch.randn(features, states, 2))
        self.D = nn.Parameter(torch.randn(features))

    @property
    def states(self) -> int:
        return self.decay.shape[1]

    def extra_repr(self) -> str:
        return f"{len(self.D)}, states={self.states}"

    def system(self) -> System:
        rate, poles = self._rate(), self._poles()
        return poles, ((poles - 1) / rate)[..., None], torch.view_as_complex(self.C)[:, None]

    def parameters_for(self, A: Tensor, B: Tensor, C: Tensor) -> Mapping[str, Tensor]:
        step = self.log_step.to(A.real.dtype).exp()[:, None]
        decay, frequency = -A.abs().clamp_min(FASTEST).log() / step, A.angle() / step
        rate = torch.complex(-decay, frequency)
        weight = C[:, 0] * B[..., 0] * rate / (A - 1)
        return {"decay": decay.log(), "frequency": frequency, "C": torch.view_as_real(weight)}

    def forward(self, u: Tensor) -> Tensor:
        length = u.shape[-2]
        _, B, C = self.system()
        times = torch.arange(length, device=u.device)
        powers = (self._rate() * self.log_step.exp()[:, None])[..., None] * times
        kernel = torch.einsum("hn,hnt->ht", C[:, 0] * B[..., 0], powers.exp()).real
        spectrum = torch.fft.rfft(kernel, n=2 * length) * torch.fft.rfft(u.mT, n=2 * length)
        return torch.fft.irfft(spectrum, n=2 * length)[..., :length].mT + self.D * u

    def step(self, u: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One time step: y and the new state, from u [batch, features] and the state before."""
        poles, B, C = self.system()
        driven = B[..., 0] * u[..., None]
        x = driven if x is None else poles * x + driven
        return (C[:, 0] * x).sum(-1).real + self.D * u, x

    def _rate(self) -> Tensor:
        return torch.complex(-self.decay.exp(), self.frequency)

    def _poles(self) -> Tensor:
        return (self._rate() * self.log_step.exp()[:, None]).exp()
