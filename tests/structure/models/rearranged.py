"""Rearranged index spaces: views, slices, concatenations, shuffles."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .shapes import IMAGE, VECTOR, Cases

__all__ = ["CASES"]


class PermuteFlatten(nn.Module):
    """Channels last, then flattened: units are the inner factor of the reader's columns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.conv(x).relu().permute(0, 2, 3, 1).flatten(1))


class ChannelShuffle(nn.Module):
    """Grouped convolutions with a shuffle between (2 groups of 8, then 2 of 8 again)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 16, 1, groups=2), nn.Conv2d(16, 12, 1, groups=2)
        self.out = nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.out(self.second(x).relu())


class Flipped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.first(x).relu().flip(-1)).relu())


class Halves(nn.Module):
    """chunk and concat again, as detection networks do: the halves have one width."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.m, self.out = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(24, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.a(x).chunk(2, 1))
        return self.out(torch.cat([*parts, self.m(parts[-1]).relu()], 1))


class PaddedShortcut(nn.Module):
    """Strided slice and zero channels on both sides (ResNet, option A)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1)
        self.out = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.out((self.b(y.relu()) + F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))).relu())


class Written(nn.Module):
    """A buffer filled piece by piece in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(5, 8), nn.Linear(5, 4), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        both = x.new_empty(len(x), a.shape[1] + b.shape[1])
        both[:, : a.shape[1]] = a
        both[:, a.shape[1] :] = b
        return self.out(both.relu_())


class Upscaled(nn.Module):
    """Sub-pixel convolution: (channel, r, r) become space."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 20, 1), nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.pixel_shuffle(self.second(self.first(x).relu()), 2).tanh())


class Dense(nn.Module):
    """Concatenations of concatenations, and a slice with numbers in the code: what it shifts stays."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(9, 4, 3, padding=1)
        self.c, self.out = nn.Conv2d(13, 5, 1), nn.Conv2d(2 + 5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([x, self.a(x)], 1).relu()
        y = torch.cat([y, self.b(y)], 1).relu()
        return self.out(torch.cat([y[:, 9:11], self.c(y)], 1))


class Maxout(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.first, self.out = width, nn.Linear(5, 16), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        width = 8 if self.width < 0 else -1
        return self.out(self.first(x).view(len(x), width, 2).amax(-1))


class SwiGlu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 16), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class FrozenBranch(nn.Module):
    """Concatenation of a trained branch with a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.frozen, self.out = nn.Linear(5, 8), nn.Linear(5, 6), nn.Linear(14, 2)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.trained(x), self.frozen(x)], -1).relu())


CASES: Cases = {
    "permute_flatten": (PermuteFlatten, (2, 3, 8, 8), [8]),
    "channel_shuffle": (ChannelShuffle, IMAGE, [2, 4, 6]),
    "flip": (Flipped, VECTOR, [6]),
    "swiglu": (SwiGlu, VECTOR, [8]),
    "frozen_branch": (FrozenBranch, VECTOR, [8]),
    "maxout": (lambda: Maxout(1), VECTOR, [8]),
    "maxout_written": (lambda: Maxout(-1), VECTOR, []),
    "halves": (Halves, (2, 3, 8, 8), [8, 8]),
    "padded_shortcut": (PaddedShortcut, (2, 3, 8, 8), [8]),
    "written_in_place": (Written, VECTOR, [4, 8]),
    "pixel_shuffle": (Upscaled, (2, 3, 8, 8), [5, 6]),
    "dense": (Dense, (2, 3, 8, 8), [2, 5]),
}
