"""The groups of a structure: a leaf axis that is one, with every slice that it stands in, and its name.

A dimension is a term over the groups (`extent_of`). It reads a group where the tape saw it contracted, whole
or at some of its positions (the keys among the rows of queries, keys and values), and computes it elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from ..extents import Concat, Extent, Fixed, Product, Units, groups_in, labels, only
from ..groups import Group, Slice
from .axes import Axis, factors_of, leaves, parts_of
from .tape import Source, Tape

__all__ = ["ALIGNED", "extent_of", "groups_of_units", "owner_of", "partial", "placed"]

ALIGNED = 8  # elements: grouped_mm wants rows of a multiple of 16 bytes


def groups_of_units(
    tape: Tape,
    numbers: dict[Axis, int],
    places: Mapping[Axis, Sequence[Source]],
    read: Mapping[Axis, set[Source]],
    tensors: Mapping[str, Sequence[Extent]],
) -> tuple[Group, ...]:
    """One for each leaf that is numbered, in that order."""
    names: Counter[str] = Counter()
    picked = {tape.routers[name].root: k for name, k in sorted(tape.picks.items(), key=lambda pick: pick[1])}
    aligned, chosen = _aligned(tape), {leaf for axis in tape.routers.values() for leaf in leaves(axis)}
    met = {leaf for event in (tape.rows.events if tape.rows else ()) for leaf in leaves(event.axis)}
    kinds, parts = dict(tape.model.named_modules()), placed(tape, numbers)
    wide = {n for n, dims in tensors.items() if len(dims) > 1}
    groups = []
    for leaf, number in numbers.items():
        slices = [
            part
            for tensor, d in places[leaf]
            for part in _slices(
                tensor, d, number, tensors[tensor][d], (tensor, d) in read.get(leaf, ()), parts
            )
        ]
        name, kind = _name(slices, number, kinds, wide)
        kind = "expert" if leaf in chosen else kind
        names[name] += 1
        name = name if names[name] == 1 else f"{name}:{names[name]}"
        multiple, least = ALIGNED if leaf in aligned else 1, picked.get(leaf, 0)
        groups.append(Group(name, leaf.size, kind, tuple(slices), multiple, least=least, met=leaf in met))
    return tuple(groups)


def _slices(
    tensor: str, d: int, group: int, extent: Extent, reads: bool, parts: Mapping[Source, Extent]
) -> list[Slice]:
    """Of one dimension: what reads the group, and what computes it."""
    part = parts.get((tensor, d), extent) if reads else extent
    slices = [Slice(tensor, d, part, "reader" if reads else "producer", part != extent)]
    if part != extent and not torch.equal(*(labels(e, group) for e in (part, extent))):
        slices.append(Slice(tensor, d, extent, "producer"))
    return slices


def extent_of(axis: Axis, numbers: dict[Axis, int]) -> Extent:
    """The axis as a term over groups; neighbours that are fixed are merged."""
    axis = axis.root
    if axis in numbers:
        return Units(numbers[axis], axis.size)
    children = factors_of(axis) if axis.factors else parts_of(axis) if axis.parts else []
    inner = [extent_of(child, numbers) for child in children]
    if not any(groups_in(extent) for extent in inner):
        return Fixed(axis.size)
    merged: list[Extent] = []
    for extent in inner:
        last = merged[-1] if merged else None
        if isinstance(extent, Fixed) and isinstance(last, Fixed):
            length = last.length * extent.length if axis.factors else last.length + extent.length
            merged[-1] = Fixed(length)
        else:
            merged.append(extent)
    return Product(tuple(merged)) if axis.factors else Concat(tuple(merged))


def partial(tape: Tape) -> dict[Source, Tensor]:
    """Dimensions that read at some of their positions: which."""
    where = {} if tape.rows is None else tape.rows.where
    return {source: positions for source, positions in where.items() if not bool(positions.all())}


def placed(tape: Tape, numbers: dict[Axis, int]) -> dict[Source, Extent]:
    """Of dimensions that read at some of their positions, what does, as a term."""
    found = {}
    for (name, d), where in partial(tape).items():
        with suppress(ValueError):
            found[name, d] = only(extent_of(tape.tensors[name][d], numbers), where)
    return found


def _aligned(tape: Tape) -> set[Axis]:
    """Leaves that are rows of a kernel that wants them in steps; of products, the check finds out."""
    found = {part.root for axis in tape.aligned for part in parts_of(axis)}
    return {leaf for leaf in found if not leaf.factors and leaf.size % ALIGNED == 0 and leaf.size > ALIGNED}


def owner_of(tensor: str) -> str:
    """Module path of a tensor; the tensor itself where it stands at the top."""
    return tensor.rpartition(".")[0] or tensor


def _name(slices: list[Slice], group: int, modules: dict[str, nn.Module], wide: set[str]) -> tuple[str, str]:
    """(name, kind) of a group, by the first tensor that computes it (`wide`: those that are no vectors)."""
    producers = [s for s in slices if s.role == "producer"]
    matrices = [s for s in producers if not isinstance(s.extent, Fixed) and s.tensor.endswith("weight")]
    first = next((s for s in matrices if s.tensor in wide), (matrices or producers)[0])
    owner = owner_of(first.tensor)
    convolution = isinstance(modules.get(owner), nn.modules.conv._ConvNd)
    return owner, _kind(first.extent, group, "channel" if convolution else "neuron")


def _kind(extent: Extent, group: int, plain: str) -> str:
    match extent:
        case Product(factors):
            free = [factor for factor in factors if groups_in(factor)]
            if len(free) == 1 and len(factors) == 2 and isinstance(factors[0], Fixed):
                return f"{plain} member" if factors[0].length > 1 else plain
            outer = "group" if plain == "channel" else "head"
            return outer if group in groups_in(free[0]) else f"{outer} member"
        case Concat(parts):
            return _kind(next(part for part in parts if group in groups_in(part)), group, plain)
        case _:
            return plain
