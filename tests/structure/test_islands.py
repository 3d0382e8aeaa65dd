"""The check asked again in float64, of models parts of which compute in float32 all the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from controlprune.structure import analyse, trial


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Net(nn.Module):
    def __init__(self, layers: int = 3, width: int = 128) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, width), nn.Linear(width, 3)
        self.norms = nn.ModuleList(Norm(width) for _ in range(layers))
        self.mixes = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 64), nn.SiLU(), nn.Linear(64, width)) for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for norm, mix in zip(self.norms, self.mixes, strict=True):
            x = x + mix(norm(x))
        weight, bias = (p.to(torch.float32) for p in (self.last.weight, self.last.bias))
        return nn.functional.linear(x.to(torch.float32), weight, bias).to(x.dtype)


def test_rounding_in_float32_is_no_reason_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trial.TOLERANCE, torch.bfloat16, 0.0)  # every draw is asked again
    torch.manual_seed(0)
    structure = analyse(Net().bfloat16(), torch.randn(16, 5).bfloat16())
    assert len(structure.groups) == 4, structure.refused
