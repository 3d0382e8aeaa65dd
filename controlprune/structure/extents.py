"""Extents: how long a tensor dimension is, as a function of the widths of the groups in it.

A group `g` has `N_g` units, of which `n_g` are live. A dimension of a tensor is not a flat list of
indices but a term over groups::

    E ::= Fixed(k)              k positions that never change
        | Units(g)              the units of group g, one position each
        | Product(E_1 … E_m)    row-major product: the reshape (E_1, …, E_m) -> (E_1·…·E_m,)
        | Concat(E_1 … E_m)     one after the other: torch.cat
        | Window(E, a, k)       positions a … a + k − 1 of E: what one process holds of a sharded dimension

so the rows of a fused qkv projection are `Product(Fixed(3), Units(heads), Fixed(64))`, and the input
of a DenseNet layer is `Concat(Units(a), Units(b), …)`. Everything else follows from the term::

    size(n):   Fixed k -> k,  Units g -> n_g,  Product -> Π,  Concat -> Σ
    keep(m):   Fixed   -> 1,  Units g -> m_g,  Product -> ⊗,  Concat -> ⊕      (bool, dense length)
               (a Window has a dense size only: it is never shrunk)
    labels(g): which unit of g each dense position belongs to, −1 where none

A mask of units is therefore always realisable as a module: every product loses whole slices.
Sizes count positions; masks are CPU bool tensors, `True` = active.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = [
    "Concat",
    "Extent",
    "Fixed",
    "Product",
    "Units",
    "Window",
    "groups_in",
    "keep",
    "labels",
    "only",
    "size",
]


@dataclass(frozen=True)
class Fixed:
    """`length` positions that belong to no group."""

    length: int


@dataclass(frozen=True)
class Units:
    """The units of group number `group` (its index in `Structure.groups`), `length` of them when dense."""

    group: int
    length: int


@dataclass(frozen=True)
class Product:
    """Row-major product, outermost factor first."""

    factors: tuple[Extent, ...]


@dataclass(frozen=True)
class Concat:
    """Segments one after the other."""

    parts: tuple[Extent, ...]


@dataclass(frozen=True)
class Window:
    """`length` positions of `whole`, from `start` on."""

    whole: Extent
    start: int
    length: int


Extent: TypeAlias = Fixed | Units | Product | Concat | Window


def size(extent: Extent, widths: Sequence[int] | None = None) -> int:
    """Length of the dimension at the given widths (`None`: dense)."""
    match extent:
        case Fixed(length):
            return length
        case Units(group, length):
            return length if widths is None else int(widths[group])
        case Product(factors):
            return math.prod(size(factor, widths) for factor in factors)
        case Concat(parts):
            return sum(size(part, widths) for part in parts)
        case Window(_, _, length):
            if widths is not None:
                raise ValueError("a window of a sharded dimension has no size but its dense one")
            return length


def keep(extent: Extent, masks: Sequence[Tensor] | Mapping[int, Tensor]) -> Tensor:
    """Which dense positions are live under `masks` (one bool tensor of `N_g` per group in it)."""
    match extent:
        case Fixed(length):
            return torch.ones(length, dtype=torch.bool)
        case Units(group, _):
            return masks[group]
        case Product(factors):
            out = torch.ones(1, dtype=torch.bool)
            for factor in factors:
                out = (out[:, None] & keep(factor, masks)[None, :]).flatten()
            return out
        case Concat(parts):
            return torch.cat([keep(part, masks) for part in parts])
        case Window(whole, start, length):
            return keep(whole, masks)[start : start + length]


def labels(extent: Extent, group: int) -> Tensor:
    """The unit of `group` at each dense position, −1 where there is none (int64).

    A group may stand in several segments of a Concat; in a Product it stands in one factor at most
    (the tracer refuses a dimension that is a group times itself).
    """
    match extent:
        case Fixed(length):
            return torch.full((length,), -1)
        case Units(other, length):
            return torch.arange(length) if other == group else torch.full((length,), -1)
        case Product(factors):
            out = torch.full((1,), -1)
            for factor in factors:
                out = torch.maximum(out[:, None], labels(factor, group)[None, :]).flatten()
            return out
        case Concat(parts):
            return torch.cat([labels(part, group) for part in parts])
        case Window(whole, start, length):
            return labels(whole, group)[start : start + length]


def only(extent: Extent, where: Tensor) -> Extent:
    """As long, with the units that stand at the positions `where` (bool), the others fixed.

    ValueError if no term says so: some units of a group stand there, others do not.
    """
    length = size(extent)
    if bool(where.all()) or isinstance(extent, Fixed):
        return extent
    if not bool(where.any()):
        return Fixed(length)
    match extent:
        case Concat(parts):
            pieces = where.split([size(part) for part in parts])
            return Concat(tuple(only(part, piece) for part, piece in zip(parts, pieces, strict=True)))
        case Product((outer, *rest)) if rest:
            inner = rest[0] if len(rest) == 1 else Product(tuple(rest))
            rows, runs = torch.unique_consecutive(where.view(size(outer), -1), dim=0, return_counts=True)
            if len(rows) == 1:
                return Product((outer, only(inner, rows[0])))
            if isinstance(outer, Concat):
                pieces = where.split([size(part) * size(inner) for part in outer.parts])
                products = (Product((part, inner)) for part in outer.parts)
                return Concat(tuple(only(*pair) for pair in zip(products, pieces, strict=True)))
            if isinstance(outer, Fixed):
                pieces = (only(inner, row) for row in rows)
                return Concat(tuple(_times(int(n), piece) for n, piece in zip(runs, pieces, strict=True)))
    raise ValueError(f"{extent} at some of its positions")


def _times(n: int, extent: Extent) -> Extent:
    return extent if n == 1 else Product((Fixed(n), extent))


def groups_in(extent: Extent) -> frozenset[int]:
    """Numbers of the groups the extent depends on."""
    match extent:
        case Fixed():
            return frozenset()
        case Units(group, _):
            return frozenset({group})
        case Product(terms) | Concat(terms):
            return frozenset().union(*(groups_in(term) for term in terms))
        case Window(whole):
            return groups_in(whole)
