"""A linear layer of live tiles only: what is off is neither kept nor multiplied with, forward and backward.

W [out, in] in tiles of R × C, S_i the live ones of tile row i, and x_j [batch, C] the j-th C of the inputs:

    y_i  = Σ_{j ∈ S_i} x_j W_ijᵀ + b_i  =  X_i P_i + b_i        X_i: [batch, C |S_i|], gathered
    ∂P_i = X_iᵀ ∂y_i               ∂x_j += (∂y_i P_iᵀ)_j       P_i: [C |S_i|, R], the row's panel

so a row of tiles is one dense product, and FLOPs fall as tiles do. The panels one below the other are the
parameter `weight`. Inputs are gathered anew in the backward pass: nothing of them is kept twice.

In a state dict `weight` is the dense one, zero where nothing is live: files fit the layer this was made of.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .layout import set_data

__all__ = ["BlockLinear", "panels", "tiles", "to_blocks", "to_dense"]

T = TypeVar("T", bound=nn.Module)


def tiles(entries: Tensor, rows: int, columns: int) -> Tensor:
    """[out, in] seen as [out/R, in/C, R, C]."""
    out, given = entries.shape
    return entries.view(out // rows, rows, given // columns, columns).transpose(1, 2)


def panels(dense: Tensor, live: Tensor) -> Tensor:
    """The live tiles of [out, in], transposed, one below the other: [tiles · C, R]. `live`: [out/R, in/C]."""
    rows, columns = _size(dense, live)
    return tiles(dense.contiguous(), rows, columns)[live].transpose(1, 2).reshape(-1, rows)


def _size(dense: Tensor, live: Tensor) -> tuple[int, int]:
    return dense.shape[0] // live.shape[0], dense.shape[1] // live.shape[1]


@dataclass(frozen=True)
class Layout:
    """Which tiles are live, [out/R, in/C], and in what order their panels are used."""

    live: Tensor
    across: Tensor  # the tile's column, row by row
    down: Tensor  # its row, column by column
    order: Tensor  # which it is row by row, column by column
    ends: tuple[int, ...]  # of every row's tiles
    column_ends: tuple[int, ...]

    @classmethod
    def of(cls, live: Tensor) -> Layout:
        down, across = live.nonzero(as_tuple=True)
        order = torch.argsort(across, stable=True)
        ends, column_ends = ((0, *live.sum(d).cumsum(0).tolist()) for d in (1, 0))
        return cls(live, across, down[order], order, ends, column_ends)


class BlockLinear(nn.Module):
    """A linear layer of live tiles; made of one by `to_blocks`, and one again by `to_dense`."""

    in_features: int
    out_features: int
    weight: nn.Parameter
    bias: nn.Parameter | None
    layout: Layout

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if self.layout.live.device != weight.device:
            self.layout = Layout.of(self.layout.live.to(weight.device))
        layout = self.layout
        if torch.is_autocast_enabled(x.device.type):
            kind = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(kind), weight.to(kind), None if bias is None else bias.to(kind)
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, self.in_features)
            if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
                y = cast(Tensor, Panels.apply(flat, weight, layout))
            else:
                y = products(flat, weight, layout.across, layout.ends)
            y = y if bias is None else y + bias
        return y.view(*x.shape[:-1], self.out_features)

    def dense_weight(self) -> Tensor:
        """[out, in], zero where nothing is live; a copy."""
        live = self.layout.live.to(self.weight.device)
        down, across = live.shape
        rows, columns = self.weight.shape[1], self.in_features // across
        whole = self.weight.new_zeros(down, across, rows, columns)
        whole[live] = self.weight.detach().view(-1, columns, rows).transpose(1, 2)
        return whole.transpose(1, 2).reshape(self.out_features, self.in_features)

    def extra_repr(self) -> str:
        rows, columns = self.weight.shape[1], self.in_features // self.layout.live.shape[1]
        live = f"{self.layout.ends[-1]} of {self.layout.live.numel()} tiles of {rows}x{columns}"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {live}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.dense_weight()

    def _load_from_state_dict(  # type: ignore[override]
        self, state_dict: Any, prefix: str, *rest: Any
    ) -> None:
        name, errors = f"{prefix}weight", rest[-1]
        dense = state_dict.get(name)
        if isinstance(dense, Tensor) and dense.shape == (self.out_features, self.in_features):
            live = self.layout.live.to(dense.device)
            if bool((tiles(dense, *_size(dense, live)) * ~live[:, :, None, None]).any()):
                errors.append(f"{name}: it is not zero in tiles that are not live in this model")
            state_dict = {**state_dict, name: panels(dense, live)}
        super()._load_from_state_dict(state_dict, prefix, *rest)


def to_blocks(linear: nn.Linear, live: Tensor) -> BlockLinear:
    """The same object as a `BlockLinear`: same parameters, hooks and keys; what is not live is gone."""
    weight = linear.weight
    gradient, live = weight.grad, live.to(weight.device)
    weight.grad = None
    set_data(weight, panels(weight.detach(), live))
    weight.grad = None if gradient is None else panels(gradient, live)
    block = _become(linear, BlockLinear)
    block.layout = Layout.of(live)
    return block


def to_dense(block: BlockLinear) -> nn.Linear:
    """An `nn.Linear` again, the same object, zero where nothing was live."""
    block.weight.grad = None
    set_data(block.weight, block.dense_weight())
    del block.layout
    return _become(block, nn.Linear)


def _become(module: Any, kind: type[T]) -> T:
    module.__class__ = kind
    return module


class Panels(torch.autograd.Function):
    """[batch, in] -> [batch, out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layout: Layout) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        ctx.layout = layout
        return products(x, weight, layout.across, layout.ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x, weight), layout = ctx.saved_tensors, ctx.layout
        needs_x, needs_weight, _ = ctx.needs_input_grad
        rows, columns = weight.shape[1], x.shape[1] // layout.live.shape[1]
        dx = dweight = None
        if needs_weight:
            dweight = torch.empty_like(weight)
            for i, (first, last) in enumerate(pairwise(layout.ends)):
                gathered = _gathered(x, columns, layout.across[first:last])
                part = dy[:, i * rows : (i + 1) * rows]
                torch.mm(gathered.t(), part, out=dweight[first * columns : last * columns])
        if needs_x:
            turned = weight.view(-1, columns, rows).index_select(0, layout.order).transpose(1, 2)
            dx = products(dy, turned.reshape(-1, columns), layout.down, layout.column_ends)
        return dx, dweight, None


def products(x: Tensor, stacked: Tensor, where: Tensor, ends: tuple[int, ...]) -> Tensor:
    """Σ of x's blocks `where` times the panels in `stacked`, one dense product for each two `ends`."""
    size = stacked.shape[0] // len(where)
    return torch.cat(
        [
            torch.mm(_gathered(x, size, where[first:last]), stacked[first * size : last * size])
            for first, last in pairwise(ends)
        ],
        dim=1,
    )


def _gathered(x: Tensor, size: int, where: Tensor) -> Tensor:
    return x.reshape(len(x), -1, size).index_select(1, where).view(len(x), -1)
