"""Random models: a list of steps on a sequence x[batch, time, channel], each real code with its own habits.

A step that needs the width reads it from the tensor, or from an attribute, as people do; nothing here is
written for pruning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from oracle import OwnNorm
from torch import Tensor, nn

__all__ = ["Program", "programs"]

WIDTHS = (4, 6, 8, 12)


class Step(nn.Module):
    """Owns parameters named by the step that made it."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, run: Callable[[Step, Tensor, list[Tensor]], Tensor], **parts: object) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, x: Tensor, earlier: list[Tensor]) -> Tensor:
        return self.run(self, x, earlier)


class Program(nn.Module):
    def __init__(self, steps: list[Step], names: list[str], width: int) -> None:
        super().__init__()
        self.steps, self.names, self.out = nn.ModuleList(steps), names, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        earlier: list[Tensor] = []
        for step in self.steps:
            x = step(x, earlier)
            earlier.append(x)
        return self.out(x)

    def extra_repr(self) -> str:
        return " → ".join(self.names)


def _linear(width: int, draw: Callable) -> tuple[Step, int]:
    new = draw(st.sampled_from(WIDTHS))
    return Step(lambda s, x, e: s.map(x), map=nn.Linear(width, new)), new


def _conv(width: int, draw: Callable) -> tuple[Step, int]:
    groups = draw(st.sampled_from([g for g in (1, 2, width) if width % g == 0]))
    new = groups * draw(st.integers(1, 3))
    conv = nn.Conv1d(width, new, 3, padding=1, groups=groups)
    return Step(lambda s, x, e: s.conv(x.transpose(1, 2)).transpose(1, 2), conv=conv), new


def _pointwise(width: int, draw: Callable) -> tuple[Step, int]:
    f = draw(st.sampled_from([torch.relu, torch.sigmoid, F.softplus, torch.exp, torch.cos]))
    return Step(lambda s, x, e: f(x).clamp(-5, 5)), width


def _batch_norm(width: int, draw: Callable) -> tuple[Step, int]:
    return Step(lambda s, x, e: s.norm(x.transpose(1, 2)).transpose(1, 2), norm=nn.BatchNorm1d(width)), width


def _group_norm(width: int, draw: Callable) -> tuple[Step, int]:
    norm = nn.GroupNorm(2, width) if width % 2 == 0 else nn.LayerNorm(width)
    if width % 2:
        return Step(lambda s, x, e: s.norm(x), norm=norm), width
    return Step(lambda s, x, e: s.norm(x.transpose(1, 2)).transpose(1, 2), norm=norm), width


def _norm(width: int, draw: Callable) -> tuple[Step, int]:
    norm = draw(st.sampled_from([nn.LayerNorm, nn.RMSNorm, OwnNorm]))
    return Step(lambda s, x, e: s.norm(x), norm=norm(width)), width


def _cat(width: int, draw: Callable) -> tuple[Step, int]:
    new = draw(st.sampled_from(WIDTHS))
    return Step(lambda s, x, e: torch.cat([x, s.side(x)], -1), side=nn.Linear(width, new)), width + new


def _cat_earlier(width: int, draw: Callable) -> tuple[Step, int]:
    return Step(lambda s, x, e: torch.cat([x.relu(), x], -1)), 2 * width


def _residual(width: int, draw: Callable) -> tuple[Step, int]:
    inner = draw(st.sampled_from(WIDTHS))
    up, down = nn.Linear(width, inner), nn.Linear(inner, width)
    return Step(lambda s, x, e: x + s.down(s.up(x).relu()), up=up, down=down), width


def _glu(width: int, draw: Callable) -> tuple[Step, int]:
    if width % 2:
        return _pointwise(width, draw)

    def run(s: Step, x: Tensor, e: list[Tensor]) -> Tensor:
        a, b = x.chunk(2, -1)
        return a * b.sigmoid()

    return Step(run), width // 2


def _shuffle(width: int, draw: Callable) -> tuple[Step, int]:
    groups = draw(st.sampled_from([g for g in (2, 3) if width % g == 0] or [1]))

    def run(s: Step, x: Tensor, e: list[Tensor]) -> Tensor:
        return x.unflatten(-1, (s.groups, -1)).transpose(-1, -2).flatten(-2)

    return Step(run, groups=groups), width


def _per_head(width: int, draw: Callable) -> tuple[Step, int]:
    heads = draw(st.sampled_from([h for h in (1, 2, 3) if width % h == 0]))
    new = draw(st.integers(1, 4))
    weight = nn.Parameter(torch.randn(heads, width // heads, new))

    def run(s: Step, x: Tensor, e: list[Tensor]) -> Tensor:
        b, t, _ = x.shape
        return torch.einsum("bthd,hde->bthe", x.view(b, t, s.heads, -1), s.weight).reshape(b, t, -1)

    return Step(run, heads=heads, weight=weight), heads * new


def _attention(width: int, draw: Callable) -> tuple[Step, int]:
    heads = draw(st.sampled_from([1, 2, 4]))
    qkv, out = nn.Linear(width, 3 * heads * 3), nn.Linear(heads * 3, width)

    def run(s: Step, x: Tensor, e: list[Tensor]) -> Tensor:
        b, t, _ = x.shape
        q, k, v = s.qkv(x).view(b, t, 3, s.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return s.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1))

    return Step(run, heads=heads, qkv=qkv, out=out), width


def _mix(width: int, draw: Callable) -> tuple[Step, int]:
    """Something that mixes the units: none of them may leave here."""
    f = draw(
        st.sampled_from(
            [
                lambda x: x.softmax(-1),
                lambda x: x - x.mean(-1, keepdim=True),
                lambda x: x.flip(-1),
                lambda x: x.roll(1, -1),
                lambda x: x.cumsum(-1) / 4,
                lambda x: x / (x.norm(dim=-1, keepdim=True) + 1),
            ]
        )
    )
    return Step(lambda s, x, e: f(x)), width


def _scale(width: int, draw: Callable) -> tuple[Step, int]:
    return Step(lambda s, x, e: x * s.gain + s.shift, gain=nn.Parameter(torch.randn(width)),
                shift=nn.Parameter(torch.randn(width))), width  # fmt: skip


def _repeat(width: int, draw: Callable) -> tuple[Step, int]:
    if width > 12:
        return _scale(width, draw)
    f = draw(st.sampled_from([lambda x: x.repeat_interleave(2, -1), lambda x: x.repeat(1, 1, 2)]))
    return Step(lambda s, x, e: f(x)), 2 * width


def _slice(width: int, draw: Callable) -> tuple[Step, int]:
    if width % 2:
        return _scale(width, draw)
    f = draw(st.sampled_from([lambda x: x[..., ::2], lambda x: x[..., : x.shape[-1] // 2]]))
    return Step(lambda s, x, e: f(x)), width // 2


def _excite(width: int, draw: Callable) -> tuple[Step, int]:
    inner = draw(st.sampled_from(WIDTHS))
    down, up = nn.Linear(width, inner), nn.Linear(inner, width)
    return Step(
        lambda s, x, e: x * s.up(s.down(x.mean(1, keepdim=True)).relu()).sigmoid(), down=down, up=up
    ), width


def _guard(width: int, draw: Callable) -> tuple[Step, int]:
    """The code asks for the width, and does another thing at some."""
    k, r = draw(st.integers(2, 13)), draw(st.integers(0, 3))
    asked = draw(
        st.sampled_from(
            [
                lambda n: n % k == r,
                lambda n: n > k,
                lambda n: n == k,
                lambda n: n in (k, 2 * k + 1),
                lambda n: n // k,
                lambda n: k < 2 * n < 3 * k,
                lambda n: n & (n - 1) == 0,
                lambda n: n / k == r,
                lambda n: len(range(n // k)) > r,
                lambda n: [False, *[True] * k][n % k],
                lambda n: math.gcd(n, k) == k,
                lambda n: f"{n}" in ("5", f"{k}"),
            ]
        )
    )
    same = draw(st.booleans())  # whatever the answer is
    return Step(
        lambda s, x, e: (x + x if same else -x) if asked(x.shape[-1]) else (2 * x if same else x)
    ), width


def _turns(width: int, draw: Callable) -> tuple[Step, int]:
    """As many turns as the width says; or it scales, or cuts."""
    k = draw(st.integers(2, 13))

    def turned(s: Step, x: Tensor, e: list[Tensor]) -> Tensor:
        for _ in range(x.shape[-1] % k // (k - 1)):
            x = -x
        return x

    def cut(s: Step, x: Tensor, e: list[Tensor]) -> Tensor:
        n = x.shape[-1] - x.shape[-1] % k // (k - 1)
        return torch.cat([x[..., :n], 2 * x[..., n:]], -1)

    scaled = lambda s, x, e: x * (1 + x.shape[-1] % k // (k - 1))  # noqa: E731
    return Step(draw(st.sampled_from([turned, cut, scaled]))), width


def _meeting(width: int, draw: Callable) -> tuple[Step, int]:
    """Another stream is added where it fits."""
    side = nn.Linear(width, draw(st.sampled_from(WIDTHS)))

    def run(s: Step, x: Tensor, e: list[Tensor]) -> Tensor:
        y = s.side(x)
        return x + y if y.shape == x.shape else x

    return Step(run, side=side), width


def _recurrent(width: int, draw: Callable) -> tuple[Step, int]:
    new = draw(st.sampled_from(WIDTHS))
    kind = draw(st.sampled_from([nn.GRU, nn.LSTM, nn.RNN]))
    return Step(lambda s, x, e: s.cells(x)[0], cells=kind(width, new, batch_first=True)), new


def _bilinear(width: int, draw: Callable) -> tuple[Step, int]:
    """Units times units, flattened: a Product of two groups."""
    a, b = nn.Linear(width, 3), nn.Linear(width, 4)
    return Step(lambda s, x, e: (s.a(x)[..., :, None] * s.b(x)[..., None, :]).flatten(-2), a=a, b=b), 12


STEPS = (
    *(_linear, _linear, _conv, _pointwise, _batch_norm, _group_norm, _norm, _norm, _cat, _cat_earlier),
    *(_residual, _glu, _shuffle, _per_head, _attention, _mix, _scale, _repeat, _slice, _excite),
    *(_recurrent, _bilinear, _guard, _guard, _turns, _meeting),
)


@st.composite
def programs(draw: Callable, longest: int = 7) -> Program:
    """A random program on x[2, 5, 4]."""
    width, steps, names = 4, [], []
    for make in draw(st.lists(st.sampled_from(STEPS), min_size=2, max_size=longest)):
        step, width = make(width, draw)
        steps.append(step)
        names.append(f"{make.__name__.strip('_')} {width}")
    return Program(steps, names, width).eval()
