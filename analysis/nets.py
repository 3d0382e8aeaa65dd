"""Networks that can be built at any widths: the native rivals of a shrunk model in `speed.py`.

A `Workload` is a network with a batch to train on. `build(widths)` makes it natively, one width per
entry of `dense`; the entries stand in the order of the groups that the tracer finds.

    mlp       784 - h1 - h2 - 10                                    hidden units
    cnn       stem a, block a-b-a, down c, block c-d-c, head        channels (a, c: residual streams)
    gpt       d = 128, per layer: heads of 32, feed-forward         heads, neurons
    resnet50  torchvision's layout, in plain torch                  channels (only for its size)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["WORKLOADS", "Workload", "resnet50", "tiny_gpt"]


@dataclass(frozen=True)
class Workload:
    """A network, and one batch of made-up data to train it on. `ignored`: layers that keep their width."""

    name: str
    dense: tuple[int, ...]
    build: Callable[[Sequence[int]], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    ignored: tuple[str, ...] = ()

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def _mlp(widths: Sequence[int]) -> nn.Module:
    h1, h2 = widths
    return nn.Sequential(nn.Linear(784, h1), nn.ReLU(), nn.Linear(h1, h2), nn.ReLU(), nn.Linear(h2, 10))


def _conv(before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after))


class _Block(nn.Module):
    def __init__(self, stream: int, inner: int) -> None:
        super().__init__()
        self.one, self.two = _conv(stream, inner), _conv(inner, stream)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.two(torch.relu(self.one(x))))


def _cnn(widths: Sequence[int]) -> nn.Module:
    a, b, c, d = widths
    return nn.Sequential(
        _conv(3, a), nn.ReLU(), _Block(a, b), _conv(a, c, 2), nn.ReLU(), _Block(c, d),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10),
    )  # fmt: skip


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.qkv = nn.Linear(width, 3 * heads * size)
        self.out = nn.Linear(heads * size, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        split = self.qkv(x).view(batch, length, 3, self.heads, self.size)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _Attention(width, heads, 32)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class _GPT(nn.Module):
    def __init__(self, widths: Sequence[int], width: int = 128, vocabulary: int = 65) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, width), nn.Embedding(64, width)
        pairs = zip(widths[::2], widths[1::2], strict=True)
        self.layers = nn.Sequential(*(_Layer(width, heads, inner) for heads, inner in pairs))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place.weight[: tokens.shape[1]]
        return self.head(self.norm(self.layers(x)))


def tiny_gpt() -> nn.Module:
    """12 layers of width 32, two heads and 64 neurons each, 25 groups: nearly all that it takes is calls."""
    return _GPT((2, 64) * 12, width=32)


def _images(count: int, channels: int, side: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, channels, side, side), torch.randint(10, (count,))


def _text(count: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(65, (count, 65))
    return tokens[:, :-1], tokens[:, 1:]


WORKLOADS = {
    w.name: w
    for w in (
        Workload("mlp", (1024, 1024), _mlp, lambda: (torch.randn(128, 784), torch.randint(10, (128,)))),
        Workload("cnn", (32, 32, 64, 64), _cnn, lambda: _images(64, 3, 16)),
        Workload("gpt", (4, 512) * 4, _GPT, lambda: _text(8), ("token",)),
    )
}


class _Bottleneck(nn.Module):
    def __init__(self, before: int, inner: int, after: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(before, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(),
            *_conv(inner, inner, stride), nn.ReLU(),
            nn.Conv2d(inner, after, 1, bias=False), nn.BatchNorm2d(after),
        )  # fmt: skip
        short = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        self.short = short if stride > 1 or before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.path(x) + self.short(x))


def resnet50() -> nn.Module:
    """25.6 million parameters."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    ]  # fmt: skip
    before = 64
    for inner, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(count):
            layers.append(_Bottleneck(before, inner, 4 * inner, stride if i == 0 else 1))
            before = 4 * inner
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 1000))
