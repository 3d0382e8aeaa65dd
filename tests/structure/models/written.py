"""Models as people write them: sizes in loops, lists, slices and keys. What stays a group must be right."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["WRITTEN"]


class Net(nn.Module):
    """x (4, 5) -> enter, 12 wide -> `middle` -> leave."""

    def __init__(self, wide: int = 12, out: int | None = None) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(5, wide), nn.Linear(out or wide, 3)

    def middle(self, h: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.middle(self.enter(x).tanh()))


class HeadsInALoop(Net):
    heads = 3

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Linear(12, 12)

    def middle(self, h: Tensor) -> Tensor:
        v, d = self.value(h), h.shape[-1] // self.heads
        return torch.cat([v[:, k * d : (k + 1) * d] * (k + 1) for k in range(self.heads)], 1)


class WidthsAsProperties(Net):
    def __init__(self) -> None:
        super().__init__(out=6)

    @property
    def half(self) -> int:
        return self.enter.out_features // 2

    def middle(self, h: Tensor) -> Tensor:
        return h[:, : self.half] * h[:, self.half :].sigmoid()


class CachedByShape(Net):
    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[int, Tensor] = {}

    def middle(self, h: Tensor) -> Tensor:
        n = h.shape[1]
        if n not in self.tables:
            self.tables[n] = torch.linspace(1, 2, n)
        return h * self.tables[n]


class ByName(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scales = {"w12": 1.0, "w7": 3.0}

    def middle(self, h: Tensor) -> Tensor:
        return h * self.scales.get(f"w{h.shape[1]}", 1.0)


class Ellipses(Net):
    def __init__(self) -> None:
        super().__init__(out=8)
        self.mix = nn.Parameter(torch.randn(2, 12, 4))

    def middle(self, h: Tensor) -> Tensor:
        return torch.einsum("...d,hde->...he", h, self.mix).flatten(-2)


class WrittenInPlace(Net):
    def middle(self, h: Tensor) -> Tensor:
        out = torch.zeros_like(h)
        out[:, ::2] = h[:, ::2]
        out[:, 1::2] = -h[:, 1::2].relu()
        return out


class LastOneWritten(Net):
    def middle(self, h: Tensor) -> Tensor:
        h = h.clone()
        h[:, h.shape[1] - 1] *= 2
        return h


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Linear(12, 12, bias=False)

    def middle(self, h: Tensor) -> Tensor:
        h = self.square(self.square(h).relu())
        return F.linear(h.tanh(), self.square.weight.t())


class Normalised(Net):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 8)

    def middle(self, h: Tensor) -> Tensor:
        weights = self.inner(h).softmax(-1)
        return F.normalize(h, dim=-1) * weights.amax(-1, keepdim=True)


class SplitByThirds(Net):
    def middle(self, h: Tensor) -> Tensor:
        n = h.shape[1]
        a, b = torch.split(h, [n // 3, n - n // 3], 1)
        return torch.cat([a.relu(), b.sigmoid()], 1)


class StackOfList(Net):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))

    def middle(self, h: Tensor) -> Tensor:
        pieces = [part(piece) for part, piece in zip(self.parts, h.chunk(4, 1), strict=True)]
        return torch.stack(pieces, 1).flatten(1)


class ScaledByRoot(Net):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(12, 6), nn.Linear(12, 6)

    def middle(self, h: Tensor) -> Tensor:
        q, k = self.q(h), self.k(h)
        return (q @ k.t() / math.sqrt(q.shape[-1])).softmax(-1) @ h


class NoWiderThan(Net):
    def __init__(self) -> None:
        super().__init__(wide=20, out=16)

    def middle(self, h: Tensor) -> Tensor:
        k = min(h.shape[1], 16)
        return F.pad(h[:, :k], (0, 16 - k))


class CommonDivisor(Net):
    def middle(self, h: Tensor) -> Tensor:
        return F.group_norm(h, math.gcd(h.shape[1], 4))


class ColumnByColumn(Net):
    def middle(self, h: Tensor) -> Tensor:
        return torch.stack([column * k for k, column in enumerate(h.unbind(1))], 1)


class ByPosition(Net):
    def middle(self, h: Tensor) -> Tensor:
        return h * (1 + torch.arange(h.shape[1]) // 10)


class Centred(Net):
    def middle(self, h: Tensor) -> Tensor:
        return h - h.sum(1, keepdim=True) / h.shape[1]


class EvensFirst(Net):
    def middle(self, h: Tensor) -> Tensor:
        n = h.shape[1]
        return h[:, [*range(0, n, 2), *range(1, n, 2)]].cumsum(0)


class BankOfColumns(Net):
    def __init__(self) -> None:
        super().__init__(out=7)
        self.bank = nn.Parameter(torch.randn(7, 16))

    def middle(self, h: Tensor) -> Tensor:
        return F.linear(h, self.bank[:, : h.shape[1]])


class MaskOfWidth(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", (torch.arange(12) % 5 != 4).float())

    def middle(self, h: Tensor) -> Tensor:
        return h * self.mask[: h.shape[-1]]


class TurnsByWidth(Net):
    def middle(self, h: Tensor) -> Tensor:
        for _ in range(h.shape[1] // 8):
            h = h + h.tanh()
        return h


class DepthByWidth(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

    def middle(self, h: Tensor) -> Tensor:
        for layer in list(self.layers)[: max(h.shape[1] // 4, 1)]:
            h = h + layer(h).relu()
        return h


WRITTEN: dict[str, Callable[[], Net]] = {
    kind.__name__: kind
    for kind in (
        *(HeadsInALoop, WidthsAsProperties, CachedByShape, ByName, Ellipses, WrittenInPlace, LastOneWritten),
        *(Tied, Normalised, SplitByThirds, StackOfList, ScaledByRoot, NoWiderThan, CommonDivisor),
        *(ColumnByColumn, ByPosition, Centred, EvensFirst, BankOfColumns, MaskOfWidth, TurnsByWidth),
        DepthByWidth,
    )
}
