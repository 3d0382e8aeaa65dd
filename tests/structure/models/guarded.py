"""Code that asks for sizes: what it then does is another thing at some widths.

`first` has 12 units (or what `width` says) and `second` 8; `follow` is what is done with the hidden layer h.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["BENIGN", "GUARDS", "Guarded"]


class Guarded(nn.Module):
    def __init__(self, follow: Callable[[Guarded, Tensor], Tensor], width: int = 12, other: int = 8) -> None:
        super().__init__()
        self.follow, self.width = follow, width
        self.kept: dict[int, int] = {}
        self.first, self.second, self.out = nn.Linear(5, width), nn.Linear(width, other), nn.Linear(other, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.follow(self, self.first(x).relu())
        return self.out(self.second(h).tanh())


def _when(asked: Callable[[Tensor], object]) -> Callable[[Guarded, Tensor], Tensor]:
    return lambda net, h: 2 * h if asked(h) else h


def _tree(net: Guarded, h: Tensor) -> Tensor:
    n = h.shape[1]
    if n % 2 == 0:
        if n % 3 == 1:
            return h * 3
        return h
    return h


def _thirds(net: Guarded, h: Tensor) -> Tensor:
    return h.reshape(-1, 3).cumsum(0).reshape(len(h), -1)


def _dims(net: Guarded, h: Tensor) -> Tensor:
    h = h.squeeze()
    return h if h.dim() == 2 else h.unsqueeze(0)


def _asserted(net: Guarded, h: Tensor) -> Tensor:
    torch._assert(
        h.dim() == 2,
        f"two dimensions expected, not {h.shape}",
    )
    return h


def _einops_like(net: Guarded, h: Tensor) -> Tensor:
    """rearrange(h, "b (g d) -> b (d g)", g=4)"""
    b, c = h.shape
    if c % 4:
        return h
    return h.reshape(b, 4, c // 4).transpose(1, 2).reshape(b, c)


def _chunks(net: Guarded, h: Tensor) -> Tensor:
    return torch.cat([piece * (k + 1) for k, piece in enumerate(torch.chunk(h, 5, 1))], 1)


def _kept(net: Guarded, h: Tensor) -> Tensor:
    return h * net.kept.setdefault(h.shape[1] % 5, len(net.kept) + 1)


def _loop(net: Guarded, h: Tensor) -> Tensor:
    n, turns = h.shape[1], 0
    while n > 3:
        n, turns = n // 2, turns + 1
    return h * turns


def _try(net: Guarded, h: Tensor) -> Tensor:
    try:
        return h.view(len(h), 3, -1).mul(2).flatten(1)
    except RuntimeError:
        return h


def _clipped(net: Guarded, h: Tensor) -> Tensor:
    return -h if min(h.shape[1], 16) % 7 == 4 else h


def _is_odd(n: int) -> bool:
    return n % 2 == 1


def _shared(net: Guarded, h: Tensor) -> Tensor:
    """The helper asks about the batch when dense, about the width only when it is small."""
    if _is_odd(h.shape[0]) or (h.shape[1] < 7 and _is_odd(h.shape[1])):
        return -h
    return h


def _remembered(net: Guarded, h: Tensor) -> Tensor:
    if "n" not in vars(net):
        net.n = h.shape[1]
    return h if h.shape[1] == net.n else -h


def _padded(net: Guarded, h: Tensor) -> Tensor:
    """To a multiple of five, and back."""
    missing = -h.shape[1] % 5
    if missing:
        h = torch.cat([h, h.new_ones(len(h), missing)], 1)
    return h.cumsum(0)[:, : h.shape[1] - missing]


def _unpacked(net: Guarded, h: Tensor) -> Tensor:
    _, *rest = h.shape
    return h if rest < [40] else -h


def _ratio(net: Guarded, h: Tensor) -> Tensor:
    return h if h.shape[1] / net.second.out_features > 1 else -h


def _rare(n: Any) -> Any:
    """1 at 45 of 64 widths, else 0, without a comparison."""
    return n * 27 % 64 // 63


def _turns(net: Guarded, h: Tensor) -> Tensor:
    for _ in range(_rare(h.shape[1])):
        h = -h
    return h


def _counted(net: Guarded, h: Tensor) -> Tensor:
    for k, _ in enumerate("ab", _rare(h.size(1))):
        h = h * (k + 1)
    return h


def _cut(net: Guarded, h: Tensor) -> Tensor:
    n = h.shape[1] - _rare(h.shape[1])
    return torch.cat([h[:, :n], 2 * h[:, n:]], 1)


def _edge(net: Guarded, h: Tensor) -> Tensor:
    return functional.pad(h, (0, _rare(h.shape[1])), value=1.0).cummax(1)[0][:, : h.shape[1]]


def _in_place(net: Guarded, h: Tensor) -> Tensor:
    h = h.clone()
    h[_rare(h.shape[1]) :] *= 2
    return h


_remembering = lru_cache(lambda n: 1 + _rare(n))

HIDDEN: dict[str, Callable[[Guarded, Tensor], Tensor]] = {  # all are other than what they were at one width
    "turns": _turns,
    "counted": _counted,
    "cut": _cut,
    "edge": _edge,
    "in_place": _in_place,
    "own_turns": lambda net, h: -h if list(range(_rare(net.first.out_features))) else h,
    "listed": lambda net, h: h * [1, 2][_rare(h.shape[1])],
    "sliced_list": lambda net, h: h * sum([1, 1][: 1 + _rare(h.shape[1])]),
    "repeated": lambda net, h: h * (1 + len([0] * _rare(h.shape[1]))),
    "some_of": lambda net, h: h * sum(itertools.islice([1, 1], 1 + _rare(h.shape[1]))),
    "scaled": lambda net, h: h * (1 + _rare(h.shape[1])),
    "stacked": lambda net, h: torch.stack([h] * (1 + _rare(h.shape[1]))).sum(0),
    "rolled": lambda net, h: h.roll(_rare(h.shape[1]), 0),
    "remembering": lambda net, h: h * _remembering(h.shape[1]),
    "tensor_of_it": lambda net, h: h * (1 + (torch.tensor(h.shape[1]) == 45)),
    "filled": lambda net, h: h * (1 + (torch.full((1,), h.shape[1]) == 45)),
    "row_of_it": lambda net, h: h * (1 + (torch.arange(h.shape[1]).amax() == 44)),
    "strides": lambda net, h: -h if h.stride(0) == 45 else h,
    "shape_as_text": lambda net, h: -h if repr(h.shape).endswith("45])") else h,
    "shape_as_key": lambda net, h: h * {torch.Size((4, 45)): 2}.get(h.shape, 1),
    "name": lambda net, h: h * {"w45": 2}.get(f"w{h.shape[1]}", 1),
    "percent": lambda net, h: -h if "%d" % h.shape[1] == "45" else h,  # noqa: UP031
    "divisor": lambda net, h: h * (2 if math.gcd(h.shape[1], 53) == 53 else 1),
    "root": lambda net, h: -h if math.sqrt(h.shape[1]) % 7 == 0 else h,
    "root_of_half": lambda net, h: -h if math.sqrt(h.shape[1] / 2) == 5 else h,
    "bits": lambda net, h: h * (2 - min((h.shape[1] ^ 45).bit_length(), 1)),
    "rounded": lambda net, h: -h if round(h.shape[1] / 64, 3) == 0.703 else h,
    "array": lambda net, h: -h if np.prod(h.shape[1:]) == 45 else h,
    "as_array": lambda net, h: -h if h.numpy().shape[1] == 45 else h,
    "as_list": lambda net, h: -h if len(h.tolist()[0]) == 45 else h,
    "bytes": lambda net, h: -h if h.nbytes == 720 else h,
    "broadcast": lambda net, h: -h if torch.broadcast_shapes(h.shape, (1, 1))[1] == 45 else h,
    "length_of_range": lambda net, h: -h if len(range(h.shape[1])) == 45 else h,
    "powers": lambda net, h: -h if pow(h.shape[1], 2, 67) == 45 * 45 % 67 else h,
    "sorted": lambda net, h: -h if sorted([h.shape[1], 45, 46])[1] == 46 else h,
    "noise": lambda net, h: functional.dropout(h, 0.5 * _rare(h.shape[1]), training=True),
}

GUARDS: dict[str, Callable[[], Guarded]] = {
    name: partial(Guarded, *(given if isinstance(given, tuple) else (given,)))
    for name, given in {
        "even": _when(lambda h: h.shape[1] % 2 == 0),
        "odd": _when(lambda h: h.size(1) % 2),
        "thirds_of_it": _when(lambda h: h.shape[-1] % 3 == 1),
        "fifths": _when(lambda h: not h.shape[-1] % 5),
        "sevenths": (_when(lambda h: h.shape[-1] % 7 == 3), 64),
        "one_width": (_when(lambda h: h.shape[1] == 37), 64),
        "band": (_when(lambda h: 20 < h.shape[1] < 24), 64),
        "wide": (_when(lambda h: h.size(1) > 16), 64),
        "narrow": _when(lambda h: h.shape[1] < 3),
        "one_of": (_when(lambda h: h.shape[1] in (24, 40)), 64),
        "power": (_when(lambda h: h.shape[1] & (h.shape[1] - 1) == 0), 48),
        "lookup": (_when(lambda h: {24: True, 40: True}.get(h.shape[1], False)), 64),
        "through_int": (_when(lambda h: int(h.shape[1]) == 24), 64),
        "through_float": (_when(lambda h: h.shape[1] / 2 == 20), 64),
        "through_root": (_when(lambda h: math.isqrt(h.shape[1]) ** 2 == h.shape[1]), 48),
        "through_length": (_when(lambda h: len(h[0]) == 30), 64),
        "through_numel": (_when(lambda h: h[0].numel() == 30), 64),
        "through_text": (_when(lambda h: str(h.shape[1]).endswith("7")), 64),
        "whole_shape": (_when(lambda h: tuple(h.shape[1:]) == (30,)), 64),
        "nested": _tree,
        "thirds": _thirds,
        "squeezed": _dims,
        "einops_like": _einops_like,
        "chunks": _chunks,
        "first_ten": (lambda net, h: torch.cat([h[:, :10], h[:, 10:] * 2], 1), 12),
        "dropped_tail": (lambda net, h: torch.cat([h[:, :-3], h[:, -3:] * 2], 1), 12),
        "kept": _kept,
        "loop": (_loop, 40),
        "try": _try,
        "clipped": (_clipped, 64),
        "shared": (_shared, 24),
        "remembered": _remembered,
        "padded": _padded,
        "unpacked": (_unpacked, 64),
        "ratio": _ratio,
        "against_own": (lambda net, h: h if h.shape[1] == net.width else -h, 12),
        "against_other": (lambda net, h: h * 2 if h.shape[1] == net.second.out_features else h, 12),
        "both": (
            lambda net, h: h * 2 if h.shape[1] % 5 == 0 and net.second.out_features % 5 == 0 else h,
            24,
            24,
        ),
    }.items()
} | {name: partial(Guarded, follow, 64) for name, follow in HIDDEN.items()}

BENIGN: dict[str, Callable[[], Guarded]] = {  # asks too, and does the same whatever the answer is
    name: partial(Guarded, *(given if isinstance(given, tuple) else (given,)))
    for name, given in {
        "asserted": lambda net, h: h if h.shape[1] == net.first.out_features else h[:, 100:],
        "same_either_way": lambda net, h: h * 2 if h.shape[1] % 2 else h + h,
        "batch": lambda net, h: h * 2 if h.shape[0] > 2 else h,
        "message": _asserted,
        "folded": lambda net, h: h.view(len(h), 2, h.shape[1] // 2).tanh().flatten(1),
        "per_example": lambda net, h: torch.stack([h[k] for k in range(h.shape[0])]),
        "rank": lambda net, h: h * 2 if h.dim() == 2 else h,
    }.items()
}
