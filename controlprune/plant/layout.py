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
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..structure.extents import Extent, keep, size

__all__ = [
    "Cut",
    "Cuts",
    "Spot",
    "Switch",
    "along",
    "at",
    "cuts_of",
    "fill_zero_",
    "move",
    "put_",
    "resting_rows",
    "restore_",
    "select",
]

Index = Mapping[int, Tensor]  # dimension -> int64 positions
Part = Literal["live", "dormant", "silent", "computing"]


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


@dataclass(frozen=True)
class Cut:
    """The positions of one dimension at given masks (int64, on the tensor's device)."""

    live: Tensor
    dormant: Tensor  # = silent ∪ computing
    silent: Tensor  # they read a dormant unit: zero in the masked layout
    computing: Tensor  # they compute a dormant unit: at work in the masked layout, unheard


Cuts = Mapping[int, Cut]  # dimension -> its positions, for dimensions with dormant ones
CutKey = tuple[Extent, frozenset[int], torch.device]


@dataclass
class Spot:
    """One tensor that units stand in, where it is cut now, and what is parked for it."""

    name: str
    extents: tuple[Extent, ...]
    is_parameter: bool
    reads: Mapping[int, frozenset[int]]  # dimension -> groups whose output it is contracted with
    groups: frozenset[int]
    cuts: Cuts = field(default_factory=dict)
    home: Tensor | None = None
    state_home: dict[str, Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> torch.Size:
        """Dense."""
        return torch.Size([size(extent) for extent in self.extents])


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
    found = {}
    for dim, extent in enumerate(spot.extents):
        key = (extent, spot.reads.get(dim, frozenset()), device)
        if key not in known:
            known[key] = _cut(extent, key[1], masks, device)
        cut = known[key]
        if cut is not None:
            found[dim] = cut
    return found


def at(cuts: Cuts, part: Part) -> dict[int, Tensor]:
    """The positions called `part`, for the dimensions that have some."""
    found = {dim: getattr(cut, part) for dim, cut in cuts.items()}
    return {dim: index for dim, index in found.items() if len(index)}


def move(
    spot: Spot,
    tensor: Tensor,
    optimizer: Optimizer | None,
    state: Mapping[str, tuple[int, ...]],
    cuts: Cuts,
    switch: Switch,
) -> None:
    """Take `tensor`, its gradient and its optimizer state from `spot.cuts` to `cuts`.

    `state`: which state tensors travel, along which dimensions.
    """
    homes = {}
    for key, dims in state.items():
        assert optimizer is not None
        entries = optimizer.state[tensor]
        value = entries[key].clone() if _shared(entries[key], tensor) else entries[key]
        entries[key], homes[key] = _moved_state(spot, key, dims, value, cuts, switch)
    grad, tensor.grad = tensor.grad, None
    if grad is not None:
        grad = _moved_grad(spot, grad, cuts, switch)
    kept: Part = "dormant" if spot.is_parameter else "silent"
    full = _whole(tensor, spot.home, spot.cuts, switch, kept)
    live, spot.home = _laid_out(full, cuts, switch, kept, "silent")
    if live is not tensor:
        set_data(tensor, live)
    tensor.grad = grad
    spot.cuts, spot.state_home = cuts, {key: home for key, home in homes.items() if home is not None}


def resting_rows(spot: Spot) -> dict[int, tuple[Tensor, Tensor]]:
    """Per dimension, the positions that compute dormant units and what stands there between steps."""
    assert spot.home is not None
    found = {}
    for dim, index in at(spot.cuts, "computing").items():
        silent = {d: where for d, where in at(spot.cuts, "silent").items() if d != dim}
        found[dim] = (index, fill_zero_(spot.home.index_select(dim, index), silent))
    return found


def _cut(extent: Extent, reads: frozenset[int], masks: Sequence[Tensor], device: torch.device) -> Cut | None:
    live = keep(extent, masks)
    if bool(live.all()):
        return None
    heard = keep(extent, [mask if g in reads else torch.ones_like(mask) for g, mask in enumerate(masks)])
    return Cut(*(where.nonzero().flatten().to(device) for where in (live, ~live, ~heard, heard & ~live)))


def along(cuts: Cuts, dims: Iterable[int]) -> dict[int, Cut]:
    return {dim: cuts[dim] for dim in dims if dim in cuts}


def _shared(state: Tensor, tensor: Tensor) -> bool:
    """Does an optimizer keep the parameter's own memory? (SAM hands its saved weights back so.)"""
    return state.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() != 0


def _whole(live: Tensor, home: Tensor | None, cuts: Cuts, switch: Switch, kept: Part) -> Tensor:
    """The dense tensor with every entry its true value; `live` itself where it is dense already."""
    if not cuts or home is None:
        return live
    if switch.now:
        return put_(home.to(live.device), at(cuts, "live"), live)
    return restore_(live, home, at(cuts, kept))


def _laid_out(
    full: Tensor, cuts: Cuts, switch: Switch, kept: Part, zero: Part
) -> tuple[Tensor, Tensor | None]:
    """The live tensor, and the home of what is dormant (if anything is)."""
    if switch.then and cuts:
        home = full.detach()
        return select(home, at(cuts, "live")), home if switch.park_on is None else home.to(switch.park_on)
    if not at(cuts, kept):
        return full, None
    home = full.detach().clone()
    return fill_zero_(full, at(cuts, zero)), home


def _moved_state(
    spot: Spot,
    key: str,
    dims: tuple[int, ...],
    live: Tensor,
    cuts: Cuts,
    switch: Switch,
) -> tuple[Tensor, Tensor | None]:
    home = spot.state_home.get(key)
    if home is not None:  # its dense shape tells without doubt
        dims = tuple(d for d, n in enumerate(home.shape) if n == spot.shape[d])
    old, new = along(spot.cuts, dims), along(cuts, dims)
    if home is None and switch.now and old:  # it appeared while units were away: zero for them
        home = _zeros(live, spot, old)
    if home is None and not switch.now:  # likewise; weight decay may have left something
        fill_zero_(live, at(old, "dormant"))
    full = _whole(live, home, old, switch, "dormant")
    return _laid_out(full, new, switch, "dormant", "dormant")


def _moved_grad(spot: Spot, grad: Tensor, cuts: Cuts, switch: Switch) -> Tensor:
    """Gradients of dormant entries do not travel: zero where a unit returns."""
    if switch.now and spot.cuts:
        grad = put_(_zeros(grad, spot, spot.cuts), at(spot.cuts, "live"), grad)
    if switch.then and cuts:
        return select(grad, at(cuts, "live"))
    return fill_zero_(grad, at(cuts, "dormant"))


def _zeros(live: Tensor, spot: Spot, cuts: Cuts) -> Tensor:
    """Zeros like `live`, but dense along the cut dimensions; strides in the parameter's order."""
    shape = torch.Size([spot.shape[d] if d in cuts else n for d, n in enumerate(live.shape)])
    if spot.home is not None and spot.home.shape == shape:
        return torch.zeros_like(spot.home, dtype=live.dtype, device=live.device)
    return live.new_zeros(shape)
