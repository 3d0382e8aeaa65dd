"""Convolutions: depthwise, grouped, transposed, filters from buffers and from activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .shapes import IMAGE, Cases

__all__ = ["CASES"]


class SqueezeExcite(nn.Module):
    """Inverted residual: expand, depthwise, squeeze-excite, project."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.norm = nn.Conv2d(4, 12, 1), nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.reduce, self.restore = nn.Conv2d(12, 6, 1), nn.Conv2d(6, 12, 1)
        self.project = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.norm(self.expand(x)).relu())
        gate = self.restore(self.reduce(F.adaptive_avg_pool2d(y, 1)).relu())
        return x + self.project(y * gate.sigmoid())


class FixedFilter(nn.Module):
    """A blur per channel from a buffer, the number of groups written as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.register_buffer("blur", torch.randn(8, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.conv2d(self.first(x), self.blur, groups=8, padding=1))


class FreeFilter(FixedFilter):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.out(F.conv2d(x, self.blur, groups=x.shape[1], padding=1))


class DynamicWeights(nn.Module):
    """Weights mixed per example, the batch folded into groups (conditional convolution)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.mixed = nn.Conv2d(3, 8, 1), nn.Parameter(torch.randn(4, 6, 8, 3, 3))
        self.route, self.out = nn.Linear(8, 4), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        b, c, h, w = y.shape
        route = self.route(y.mean((2, 3))).softmax(-1)
        weight = (route @ self.mixed.view(4, -1)).view(-1, c, 3, 3)
        return self.out(F.conv2d(y.reshape(1, b * c, h, w), weight, padding=1, groups=b).view(b, -1, h, w))


class Transposed(nn.Module):
    """Encoder, transposed and grouped transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv1d(3, 8, 4, 2, 1), nn.ConvTranspose1d(8, 12, 4, 2, 1)
        self.grouped, self.out = nn.ConvTranspose1d(12, 9, 3, 1, 1, groups=3), nn.Conv1d(9, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2)
        return self.out(self.grouped(self.up(self.down(x).relu()).relu()).relu())


CASES: Cases = {
    "squeeze_excite": (SqueezeExcite, IMAGE, [6, 12]),
    "fixed_filter": (FixedFilter, (2, 3, 8, 8), []),
    "free_filter": (FreeFilter, (2, 3, 8, 8), [8]),
    "dynamic_weights": (DynamicWeights, (2, 3, 8, 8), [6]),
    "transposed": (Transposed, (2, 3, 4, 4), [3, 3, 4, 8]),
}
