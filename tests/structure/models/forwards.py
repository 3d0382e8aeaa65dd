"""What a forward does between the layers: norms, softmax, branches, widths as values, unknown operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .shapes import VECTOR, Cases

__all__ = ["CASES"]


class PreNorm(nn.Module):
    """LayerNorm on a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm = nn.Linear(5, 8), nn.LayerNorm(8)
        self.up, self.down, self.out = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.out(x + self.down(F.gelu(self.up(self.norm(x)))))


class RootMeanSquare(PreNorm):
    """The same with an RMSNorm written out, outside of any module of its own: the stream stays."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        del self.norm

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        normal = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.scale
        return self.out(x + self.down(F.gelu(self.up(normal))))


class FunctionNorm(PreNorm):
    """The same with a norm called as a function, its size written down."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        normal = F.layer_norm(x, (8,), self.norm.weight, self.norm.bias)
        return self.out(x + self.down(F.gelu(self.up(normal))))


class Grouped(nn.Module):
    """GroupNorm: members share statistics, whole groups have their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.out = nn.Conv2d(3, 12, 3), nn.GroupNorm(4, 12), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.first(x)).relu())


class SoftUnits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.first(x).softmax(-1)).relu())


class SoftWritten(SoftUnits):
    """The linear layer is no module that could be told which units are off."""

    def forward(self, x: Tensor) -> Tensor:
        logits = nn.functional.linear(x, self.first.weight, self.first.bias)
        return self.out(self.second(logits.softmax(-1)).relu())


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(
            checkpoint(lambda z: self.second(self.first(z).relu()).relu(), x, use_reentrant=False)
        )


@torch.library.custom_op("controlprune_test::blur", mutates_args=())
def blur(x: Tensor) -> Tensor:
    """Somebody's kernel."""
    return x + x.roll(1, -1)


class Unknown(nn.Module):
    """An operator without a rule on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(blur(self.first(x))).relu())


class AuxiliaryHead(nn.Module):
    """In training mode a second head reads the hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out, self.aux = nn.Linear(5, 8), nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.out(x) + self.aux(x) if self.training else self.out(x)


class AuxiliaryWritten(nn.Module):
    """The same with the hidden width written into the training branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 6)
        self.out, self.aux = nn.Linear(6, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        side = self.aux(x.view(-1, 2, 4)).sum(1) if self.training else 0.0
        return self.out(self.second(x).relu()) + side


class ScaledByWidth(nn.Module):
    """The width enters the values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.out(x * x.shape[-1] ** -0.5)


class AddedWhereItFits(nn.Module):
    """A shortcut only where two widths are equal: they are not, until one is shrunk to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(5, 8), nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        y = self.second(x).relu()
        return self.out(y + x if y.shape == x.shape else y)


class AloneIsApart(nn.Module):
    """The size of a group is written in the code, but not where a single group is left."""

    def __init__(self) -> None:
        super().__init__()
        self.groups, self.first, self.out = 2, nn.Linear(5, 16), nn.Linear(12, 2)
        self.weight = nn.Parameter(torch.randn(2, 8, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        if self.groups > 1:
            x = torch.matmul(x.view(-1, self.groups, 8).transpose(0, 1), self.weight)
            return self.out(x.transpose(0, 1).flatten(1).tanh())
        return self.out((x @ self.weight.squeeze(0)).tanh())


CASES: Cases = {
    "pre_norm": (PreNorm, VECTOR, [8, 12]),
    "function_norm": (FunctionNorm, VECTOR, [12]),
    "rms_norm": (RootMeanSquare, VECTOR, [12]),
    "group_norm": (Grouped, (2, 3, 8, 8), [3, 4]),
    "softmax_units": (SoftUnits, VECTOR, [6, 8]),
    "softmax_written": (SoftWritten, VECTOR, [6]),
    "checkpoint": (Checkpointed, VECTOR, [6, 8]),
    "unknown_operator": (Unknown, VECTOR, [6]),
    "auxiliary_head": (AuxiliaryHead, VECTOR, [8]),
    "auxiliary_written": (AuxiliaryWritten, VECTOR, [6]),
    "added_where_it_fits": (AddedWhereItFits, VECTOR, [8]),
    "alone_is_apart": (AloneIsApart, VECTOR, [2, 6]),
    "scaled_by_width": (ScaledByWidth, VECTOR, []),
}
