"""Weights that are more than one layer's matrix: shared, raw, tied, normed, adapted, complex, kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from .shapes import SEQUENCE, VECTOR, Cases

__all__ = ["CASES"]


class Twice(nn.Module):
    """One linear used twice: its rows and columns are the same units."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.same, self.out = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.out(self.same(self.same(x).relu()).relu())


class RawParameters(nn.Module):
    """einsum and matmul on parameters that no layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(5, 3, 8))
        self.down = nn.Parameter(torch.randn(3, 8, 6))
        self.scale = nn.Parameter(torch.randn(6))
        self.last = nn.Parameter(torch.randn(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("bi,ihk->bhk", x, self.up).sigmoid()
        return (torch.einsum("bhk,hkm->bm", hidden, self.down) * self.scale).tanh() @ self.last


class WeightNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Linear(5, 8))
        self.second = parametrizations.weight_norm(nn.Conv1d(8, 6, 3, padding=1))
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.first(x).relu().transpose(1, 2)).relu().mean(-1))


class SpectralNorm(nn.Module):
    """σ of the weight depends on every row."""

    def __init__(self) -> None:
        super().__init__()
        self.first = parametrizations.spectral_norm(nn.Linear(5, 8))
        self.second, self.out = nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.first(x).relu()).relu())


class Lora(nn.Module):
    """A frozen weight and a trained low-rank update of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.base, self.out = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 2)
        self.base.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base.weight + self.b @ self.a
        return self.out(F.linear(self.first(x).relu(), weight, self.base.bias).relu())


class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(11, 6), nn.Linear(6, 9), nn.Linear(9, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(x + self.down(self.up(x).relu()))


class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight).sigmoid() @ self.weight


class ChannelBuffer(nn.Module):
    """A buffer with one entry per channel, and a table of relative positions per head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 2)
        self.register_buffer("offset", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.second((self.first(x) + self.offset).relu())


class ComplexWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(5, 8, dtype=torch.cfloat))
        self.down = nn.Parameter(torch.randn(8, 3, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.to(torch.cfloat) @ self.up
        return ((hidden * hidden.abs()) @ self.down).real


class BilinearPair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.pair = nn.Linear(5, 8), nn.Linear(5, 6), nn.Bilinear(8, 6, 7)
        self.out = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.pair(self.a(x).relu(), self.b(x).tanh()).relu())


class KeptFilter(nn.Module):
    """In eval mode the columns that read the first layer are kept too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.kept = nn.Linear(5, 8), nn.Linear(8, 6), None
        self.out = nn.Linear(6, 2)

    def train(self, mode: bool = True) -> KeptFilter:
        self.kept = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None or self.training:
            self.kept = self.second.weight * 2
        return self.out(F.linear(self.first(x).relu(), self.kept, self.second.bias).relu())


CASES: Cases = {
    "twice": (Twice, VECTOR, [8]),
    "raw_parameters": (RawParameters, VECTOR, [3, 6, 8]),
    "weight_norm": (WeightNorm, SEQUENCE, [6, 8]),
    "lora": (Lora, VECTOR, [4, 6, 8]),
    "tied_embedding": (TiedEmbedding, torch.arange(6).view(2, 3), [6, 9]),
    "tied_autoencoder": (TiedAutoencoder, VECTOR, []),
    "channel_buffer": (ChannelBuffer, VECTOR, [8]),
    "complex": (ComplexWeights, VECTOR, [8]),
    "spectral_norm": (SpectralNorm, VECTOR, [6, 8]),
    "bilinear": (BilinearPair, VECTOR, [6, 7, 8]),
    "kept_filter": (KeptFilter, VECTOR, [6, 8]),
}
