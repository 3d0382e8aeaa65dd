"""Shrink and expand: index arithmetic on tensors, exact in both directions.

With `I_d` the live positions of dimension `d` (all of them where `d` is missing from the map) and `D_d`
the dormant ones, an entry is live iff its position is live in every dimension:

    shrink:   S = F[I_0 × I_1 × …]                         select
    expand:   F[I_0 × I_1 × …] = S, all else untouched     put_
    restore:  L[D_d] = H[D_d] for every d                  restore_  (dense shape: dormant entries from H)

Copies only: no arithmetic, hence bit-exact for every dtype. The order of the strides (channels_last, …)
is kept, so that a shrunk tensor lies in memory as a natively built one does.

Memory: compact, a touched tensor and its optimizer state take their dense size (the home, on `park_on` if
given) and their live size; masked, twice their dense size; all of it is given back with the last unit.

A `Spot` is one tensor of the model that units stand in. Its `home` (and one per state tensor of the
optimizer) is dense, holds what is dormant, and exists only while something is; its live entries are
stale. `move` goes from any cuts and layout to any other: make whole, then lay out anew. In the masked
layout (dense shapes)

                          home is the truth for     the live tensor starts with zero at
    parameter             dormant entries           silent entries (kept zero)
    its optimizer state   dormant entries           dormant entries (what weight decay adds is overwritten)
    buffer                silent entries            silent entries
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..structure.extents import Extent, size
from .cuts import Cut, CutKey, Cuts, Index, Part, along, at, cuts_at
from .parking import fetched, parked

__all__ = [
    "Changed",
    "Cut",
    "Cuts",
    "Index",
    "Spot",
    "Switch",
    "along",
    "at",
    "cuts_of",
    "fill_zero_",
    "follow",
    "move",
    "put_",
    "require_as_laid",
    "resting_rows",
    "restore_",
    "select",
    "set_data",
    "whole",
]


def select(full: Tensor, live: Index) -> Tensor:
    """The live entries of `full`, dense in memory, strides in the order `full` has them."""
    order = sorted(range(full.ndim), key=full.stride, reverse=True)
    part = full.permute(order)
    for physical, dim in enumerate(order):
        if dim in live:
            part = part.index_select(physical, live[dim])
    return part.permute(sorted(range(full.ndim), key=order.__getitem__))


def put_(full: Tensor, live: Index, part: Tensor) -> Tensor:
    """Write `part` over the live entries of `full`, in place."""
    if not live:
        return full.copy_(part)
    dim = min(live)
    rest = {d: index for d, index in live.items() if d != dim}
    if rest:
        part = put_(full.index_select(dim, live[dim]), rest, part)
    return full.index_copy_(dim, live[dim], part)


def restore_(tensor: Tensor, home: Tensor, dormant: Index) -> Tensor:
    """Write the dormant entries of `home` over those of `tensor` (same shape), in place."""
    for dim, index in dormant.items():
        tensor.index_copy_(dim, index, home.index_select(dim, index))
    return tensor


def fill_zero_(tensor: Tensor, index: Index) -> Tensor:
    """Zero the positions of `index` along each of its dimensions, in place."""
    for dim, positions in index.items():
        tensor.index_fill_(dim, positions, 0)
    return tensor


def set_data(tensor: Tensor, data: Tensor) -> None:
    """Give a parameter or buffer new data of any shape; the tensor object stays the user's own.

    While a graph of the last step is still alive, autograd keeps the parameter's gradient accumulator
    with the old shape, and the next backward would fail; passing through another dtype resets it. With the
    same shape it is kept, and with it what others hooked to it (DDP).
    """
    if tensor.requires_grad and data.shape != tensor.shape:
        other = torch.float32 if tensor.dtype == torch.float64 else torch.float64
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data


@dataclass
class Spot:
    """One tensor that units stand in, where it is cut now, and what is parked for it."""

    name: str
    extents: tuple[Extent, ...]
    is_parameter: bool
    reads: Mapping[int, frozenset[int]]  # dimension -> groups whose output it is contracted with
    groups: frozenset[int]
    readers: Mapping[int, Extent] = field(default_factory=dict)  # where a part of a dimension reads: that
    cuts: Cuts = field(default_factory=dict)
    home: Tensor | None = None
    state_home: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def shape(self) -> torch.Size:
        """Dense."""
        return torch.Size([size(extent) for extent in self.extents])

    @property
    def left(self) -> torch.Size:
        """Compact."""
        if not self.cuts:
            return self.shape
        return torch.Size(
            [self.cuts[d].live.shape[0] if d in self.cuts else n for d, n in enumerate(self.shape)]
        )

    def keys(self, device: torch.device) -> list[CutKey]:
        """Of its dimensions."""
        return [
            (extent, self.readers.get(d, extent), self.reads.get(d, frozenset()), device)
            for d, extent in enumerate(self.extents)
        ]


@dataclass(frozen=True)
class Switch:
    """From one layout to another: is it and will it be compact, and where do homes wait while compact?"""

    now: bool
    then: bool
    park_on: torch.device | None  # None: beside the live tensor


def cuts_of(
    spot: Spot, masks: Sequence[Tensor], device: torch.device, known: dict[CutKey, Cut | None]
) -> dict[int, Cut]:
    """The cuts of `spot` at `masks`; `known` holds those of equal extents, worked out once per device."""
    keys = spot.keys(device)
    known |= cuts_at([key for key in keys if key not in known], masks)
    return {dim: one for dim, key in enumerate(keys) if (one := known[key]) is not None}


class Changed(RuntimeError):
    """The model is not as the plant left it."""


def require_as_laid(spots: Iterable[Spot], tensors: Mapping[str, Tensor], *, compact: bool) -> None:
    """`Changed`, which names it, if a tensor is not as it was left: gone, or of another shape."""
    for spot in spots:
        left, found = spot.left if compact else spot.shape, tensors.get(spot.name)
        if found is None or found.shape != left:
            what = "gone" if found is None else f"of shape {tuple(found.shape)}, and was {tuple(left)}"
            raise Changed(
                f"model: its tensor {spot.name!r} is {what}: replaced, pruned or parametrized by others "
                "since the controller was attached; undo that, or detach before and attach anew after it"
            )


def move(
    spot: Spot,
    tensor: Tensor,
    optimizer: Optimizer | None,
    state: Mapping[str, tuple[int, ...]],
    cuts: Cuts,
    switch: Switch,
    undo: ExitStack,
) -> None:
    """Take `tensor`, its gradient and its optimizer state from `spot.cuts` to `cuts`.

    `state`: which state tensors travel, along which dimensions. Everything is worked out before anything is
    changed, and `undo` told how to change it back.
    """
    entries: dict[str, Any] = {} if optimizer is None or not state else optimizer.state[tensor]
    kept: Part = "dormant" if spot.is_parameter else "silent"
    own = {key: x.clone() if _shared(x, tensor) else x for key, x in entries.items() if key in state}
    moved = {key: _moved_state(spot, key, dims, own[key], cuts, switch) for key, dims in state.items()}
    grad = None if tensor.grad is None else _moved_grad(spot, tensor.grad, cuts, switch)
    live = tensor.detach()
    laid = _laid_out(live, spot.home, spot.cuts, cuts, switch, kept, "silent")
    undo.callback(_put_back, spot, tensor, entries, _Before.of(spot, tensor, {k: entries[k] for k in state}))
    for one in (laid, *moved.values()):
        undo.callback(one.unwrite)
        one.write()
    entries.update({key: one.live for key, one in moved.items()})
    tensor.grad = None
    if laid.live is not live:
        set_data(tensor, laid.live)
    tensor.grad = grad
    spot.cuts, spot.home = cuts, laid.home
    spot.state_home = {key: one.home for key, one in moved.items() if one.home is not None}
    if grad is not None and not switch.then:
        _rest(grad, at(cuts, "dormant"), undo)


def _rest(grad: Tensor, dormant: Index, undo: ExitStack) -> None:
    """Gradients of dormant entries are dropped, in place."""
    if grad.layout == torch.sparse_coo:
        grad = grad._values()
    for dim, index in dormant.items():
        undo.callback(grad.index_copy_, dim, index, grad.index_select(dim, index))
        grad.index_fill_(dim, index, 0)


@dataclass(frozen=True)
class _Before:
    """What `move` puts elsewhere, as it was."""

    data: Tensor
    grad: Tensor | None
    cuts: Cuts
    home: Tensor | None
    state_home: dict[str, Tensor]
    state: dict[str, Tensor]

    @classmethod
    def of(cls, spot: Spot, tensor: Tensor, state: dict[str, Tensor]) -> _Before:
        return cls(tensor.data, tensor.grad, spot.cuts, spot.home, spot.state_home, state)


def _put_back(spot: Spot, tensor: Tensor, entries: dict[str, Any], before: _Before) -> None:
    tensor.grad = None
    set_data(tensor, before.data)
    tensor.grad = before.grad
    entries.update(before.state)
    spot.cuts, spot.home, spot.state_home = before.cuts, before.home, before.state_home


def follow(
    spot: Spot,
    live: Tensor,
    masks: Sequence[Tensor],
    park_on: torch.device | None,
    known: dict[CutKey, Cut | None],
) -> bool:
    """Where the live tensor went to another number type or device, what is parked goes too; did it?"""
    assert spot.home is not None
    here = next((cut.live.device for cut in spot.cuts.values()), spot.home.device)  # a shard may have no cut
    if (spot.home.dtype, here) == (live.dtype, live.device):
        return False
    spot.cuts = cuts_of(spot, masks, live.device, known)
    spot.home = spot.home.to(park_on or live.device, live.dtype)
    return True


def resting_rows(spot: Spot) -> dict[int, tuple[Tensor, Tensor]]:
    """Per dimension, the positions that compute dormant units and what stands there between steps."""
    assert spot.home is not None
    found = {}
    for dim, index in at(spot.cuts, "computing").items():
        silent = {d: where for d, where in at(spot.cuts, "silent").items() if d != dim}
        found[dim] = (index, fill_zero_(spot.home.index_select(dim, index), silent))
    return found


def _shared(state: Tensor, tensor: Tensor) -> bool:
    """Does an optimizer keep the parameter's own memory? (SAM hands its saved weights back so.)"""
    return state.layout == torch.strided and torch._C._is_alias_of(state, tensor)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Laid:
    """A tensor in its new layout, and the home of what is dormant (if anything is).

    Where it stays dense, `live` is the tensor there was, and changes in place when it is written: parked
    entries return, those that nothing reads become zero.
    """

    live: Tensor
    home: Tensor | None
    pieces: tuple[tuple[int, Tensor, Tensor], ...] = ()  # dimension, positions, what returns there
    zero: Index = field(default_factory=dict)
    zero_before: Index = field(default_factory=dict)

    def write(self) -> None:
        for dim, index, values in self.pieces:
            self.live.index_copy_(dim, index, values)
        fill_zero_(self.live, self.zero)

    def unwrite(self) -> None:
        """However much was written: the home has the true values."""
        if self.home is not None and self.zero:
            restore_(self.live, self.home, self.zero)
        fill_zero_(self.live, self.zero_before)


def _laid_out(
    live: Tensor, home: Tensor | None, cuts: Cuts, then: Cuts, switch: Switch, kept: Part, zero: Part
) -> _Laid:
    """`live` from `cuts` to the cuts `then`; of the old home only stale entries are written."""
    compact, cut = switch.now and home is not None, bool(cuts) and home is not None
    true = live if not cut or home is None else whole(live, fetched(home, live), cuts, switch.now, kept)
    if switch.then and then:
        small = select(true, at(then, "live"))
        return _Laid(small, parked(true, switch.park_on))
    parks = bool(at(then, kept))
    if compact:
        return _Laid(fill_zero_(true.clone(), at(then, zero)) if parks else true, true if parks else None)
    returned = {d: (index, true.index_select(d, index)) for d, index in at(cuts, kept).items()} if cut else {}
    pieces = tuple((d, *piece) for d, piece in returned.items())
    aside = (true if cut else true.clone()) if parks else None
    return _Laid(live, aside, pieces, at(then, zero) if parks else {}, at(cuts, zero) if cut else {})


def whole(live: Tensor, home: Tensor, cuts: Cuts, compact: bool, kept: Part) -> Tensor:
    """`home` with every entry its true value: those of `live` that are true are written over stale ones."""
    if compact:
        return put_(home, at(cuts, "live"), live)
    true = {
        d: cut.live if kept == "dormant" else torch.cat([cut.live, cut.computing]) for d, cut in cuts.items()
    }
    return put_(home, true, select(live, true))


def _moved_state(
    spot: Spot,
    key: str,
    dims: tuple[int, ...],
    live: Tensor,
    cuts: Cuts,
    switch: Switch,
) -> _Laid:
    live = live.to_dense() if live.layout != torch.strided else live  # momentum of sparse gradients
    home = spot.state_home.get(key)
    if home is not None:  # its dense shape tells without doubt
        dims = tuple(d for d, n in enumerate(home.shape) if n == spot.shape[d])
    old, new = along(spot.cuts, dims), along(cuts, dims)
    if home is None and switch.now and old:  # it appeared while units were away: zero for them
        home = _zeros(live, spot, old)
    if home is None and not switch.now:  # likewise; weight decay may have left something
        fill_zero_(live, at(old, "dormant"))
    return _laid_out(live, home, old, new, switch, "dormant", "dormant")


def _moved_grad(spot: Spot, grad: Tensor, cuts: Cuts, switch: Switch) -> Tensor:
    """In the new shape; zero where a unit returns to the tensor."""
    if grad.layout == torch.sparse_coo:
        return _moved_rows(spot, grad.coalesce(), cuts, switch)
    if switch.now and spot.cuts:
        grad = put_(_zeros(grad, spot, spot.cuts), at(spot.cuts, "live"), grad)
    return select(grad, at(cuts, "live")) if switch.then and cuts else grad


def _moved_rows(spot: Spot, grad: Tensor, cuts: Cuts, switch: Switch) -> Tensor:
    """A gradient of some rows (an embedding's): units stand in its columns, or nobody knows them."""
    if grad.sparse_dim() != 1 or 0 in cuts or 0 in spot.cuts:
        return _moved_grad(spot, grad.to_dense(), cuts, switch).to_sparse(grad.sparse_dim())
    values = _moved_grad(spot, grad.values(), cuts, switch)
    shape = (len(grad), *values.shape[1:])
    return torch.sparse_coo_tensor(grad.indices(), values, shape, is_coalesced=True, check_invariants=False)


def _zeros(live: Tensor, spot: Spot, cuts: Cuts) -> Tensor:
    """Zeros like `live`, but dense along the cut dimensions; strides in the parameter's order."""
    shape = torch.Size([spot.shape[d] if d in cuts else n for d, n in enumerate(live.shape)])
    if spot.home is not None and spot.home.shape == shape:
        return torch.zeros_like(spot.home, dtype=live.dtype, device=live.device)
    return live.new_zeros(shape)
