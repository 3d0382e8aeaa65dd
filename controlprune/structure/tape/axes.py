"""Axes: the unknowns that a trace solves for.

Every dimension of every tensor in a trace is an `Axis`: an index space of known size whose inner
structure is found out as operators are met. An axis is a leaf, or a term over smaller axes::

    A ::= leaf | Product(A_1 … A_m)  (row-major)  | Concat(A_1 … A_m)

and four operations refine it, each exact in positions (position i before is position i after)::

    unify(a, b)          both are the same index space                    x + y, x @ w
    regroup([a…], [n…])  the row-major product a_1×a_2×… cut to sizes n   view, reshape, flatten
    segment(a, [n…])     a is a concatenation of pieces of sizes n        split, chunk, slice, cat
    pin(a, reason)       no position of a may ever leave                  sum, softmax, model output

A leaf that is cut later becomes a Product or Concat *in place*, so what was learned earlier about it
holds for its pieces: order of discovery doesn't matter. Sizes are dense lengths. What can't be cut as
asked raises `Misfit`; the rules pin everything involved then.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

__all__ = [
    "MISFIT",
    "Axis",
    "Misfit",
    "concat",
    "factors_of",
    "leaves",
    "parts_of",
    "pin",
    "product",
    "regroup",
    "segment",
    "unify",
]

MISFIT = "a reshape, split or shuffle cuts its units in two ways that do not fit together"

MOST_COPIES = 64  # a product cut at uneven places is written out as copies of its inner axis, up to here


class Misfit(Exception):
    """The axis can't be cut at the positions asked for."""


class Axis:
    """A leaf, a Product (`factors`), a Concat (`parts`), or a link to the node it was unified with."""

    __slots__ = ("factors", "link", "parts", "reason", "size")

    def __init__(self, size: int, reason: str | None = None) -> None:
        self.size = int(size)
        self.reason = reason  # why a leaf is pinned ("" = internal, not worth telling); None = free
        self.link: Axis | None = None
        self.factors: tuple[Axis, ...] = ()
        self.parts: tuple[Axis, ...] = ()

    @property
    def root(self) -> Axis:
        axis = self
        while axis.link is not None:
            if axis.link.link is not None:
                axis.link = axis.link.link
            axis = axis.link
        return axis

    def __repr__(self) -> str:
        axis = self.root
        if axis.factors:
            return f"Product{axis.factors}"
        if axis.parts:
            return f"Concat{axis.parts}"
        return f"{axis.size}{'' if axis.reason is None else '!'}"


def factors_of(axis: Axis) -> list[Axis]:
    """The axis as a flat row-major product of leaves and Concats, factors of size 1 left out."""
    axis = axis.root
    if axis.size == 1:
        return []
    if not axis.factors:
        return [axis]
    return [flat for factor in axis.factors for flat in factors_of(factor)]


def parts_of(axis: Axis) -> list[Axis]:
    """The axis as a flat concatenation of leaves and Products, empty parts left out."""
    axis = axis.root
    if axis.size == 0:
        return []
    if not axis.parts:
        return [axis]
    return [flat for part in axis.parts for flat in parts_of(part)]


def leaves(axis: Axis) -> list[Axis]:
    """The leaves under the axis (size over 1), each as often as it stands there."""
    axis = axis.root
    inner = axis.factors or axis.parts
    if inner:
        return [leaf for child in inner for leaf in leaves(child)]
    return [axis] if axis.size > 1 else []


def pin(axis: Axis, reason: str) -> None:
    """No position of the axis may leave; the first reason is kept, a told one over an internal one."""
    for leaf in leaves(axis):
        leaf.reason = leaf.reason or reason


def product(axes: Iterable[Axis]) -> Axis:
    """The row-major product as one axis."""
    factors = [flat for axis in axes for flat in factors_of(axis)]
    if len(factors) == 1:
        return factors[0]
    out = Axis(math.prod(factor.size for factor in factors))
    out.factors = tuple(factors)
    return out


def concat(axes: Iterable[Axis]) -> Axis:
    """The concatenation as one axis."""
    parts = [flat for axis in axes for flat in parts_of(axis)]
    if len(parts) == 1:
        return parts[0]
    out = Axis(sum(part.size for part in parts))
    out.parts = tuple(parts)
    return out


def regroup(axes: Sequence[Axis], sizes: Sequence[int]) -> list[Axis]:
    """Cut the row-major product of `axes` to axes of the given sizes (their product must agree)."""
    if len(axes) == len(sizes) and all(axis.size == size for axis, size in zip(axes, sizes, strict=True)):
        return list(axes)
    stack = [factor for axis in reversed(axes) for factor in reversed(factors_of(axis))]
    out = []
    for size in sizes:
        taken, need = [], size
        while need != 1:
            if not stack:
                raise Misfit
            fresh = factors_of(stack.pop())  # may have been cut since it was put there
            stack.extend(reversed(fresh))
            factor = stack.pop()
            if need % factor.size == 0:
                taken.append(factor)
                need //= factor.size
            elif factor.size % need == 0:
                outer, inner = _cut(factor, need)
                stack.append(inner)
                taken.append(outer)
                need = 1
            else:
                raise Misfit
        out.append(product(taken))
    return out


def _cut(axis: Axis, outer_size: int) -> tuple[Axis, Axis]:
    """A leaf or Concat as Product(outer, inner)."""
    inner_size = axis.size // outer_size
    if not axis.parts:
        outer, inner = Axis(outer_size, axis.reason), Axis(inner_size, axis.reason)
    elif all(part.size % inner_size == 0 for part in parts_of(axis)):
        pairs = [regroup([part], [part.size // inner_size, inner_size]) for part in parts_of(axis)]
        outer, inner = concat(pair[0] for pair in pairs), pairs[0][1]
        for pair in pairs[1:]:
            unify(inner, pair[1])
        if len(pairs) == outer_size:
            outer = Axis(outer_size, "")
    else:
        chunks = segment(axis, [inner_size] * outer_size)
        outer, inner = Axis(outer_size, ""), chunks[0]
        for chunk in chunks[1:]:
            unify(inner, chunk)
    axis.parts, axis.factors = (), (outer, inner)
    return outer, inner


def segment(axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """Cut the axis to consecutive pieces of the given sizes (their sum must agree)."""
    axis = axis.root
    if axis.size in sizes:
        return [axis if size == axis.size else Axis(size) for size in sizes]
    if axis.factors:
        outer, *rest = factors_of(axis)
        inner = product(rest)
        if all(size % inner.size == 0 for size in sizes):
            pieces = segment(outer, [size // inner.size for size in sizes])
            return [product([piece, inner]) for piece in pieces]
        if outer.size > MOST_COPIES:
            raise Misfit
        pin(outer, MISFIT)
        axis.factors, axis.parts = (), (inner,) * outer.size
    if not axis.parts:
        pieces = [Axis(size, axis.reason) for size in sizes]
        axis.parts = tuple(piece for piece in pieces if piece.size)
        return pieces
    stack = list(reversed(parts_of(axis)))
    out = []
    for size in sizes:
        taken, need = [], size
        while need:
            stack.extend(reversed(parts_of(stack.pop())))
            part = stack.pop()
            if part.size > need:
                part, rest = segment(part, [need, part.size - need])
                stack.append(rest)
            taken.append(part)
            need -= part.size
        out.append(concat(taken) if taken else Axis(0))
    return out


def unify(a: Axis, b: Axis) -> Axis:
    """Make both the same index space; pins both where their structures can't agree."""
    a, b = a.root, b.root
    if a is b or a.size == 1:
        return a
    if a.size != b.size:
        raise ValueError(f"internal: axes of sizes {a.size} and {b.size} can't be the same")
    if not (b.factors or b.parts):
        a, b = b, a
    if not (a.factors or a.parts):  # a leaf takes the structure of the other
        if a.reason is not None:
            pin(b, a.reason)
        a.link = b
        return b
    try:
        if a.parts and b.parts:
            mine = parts_of(a)
            theirs = segment(b, [part.size for part in mine])
        else:
            shape, other = (a, b) if a.factors else (b, a)
            mine = factors_of(shape)
            theirs = regroup([other], [factor.size for factor in mine])
    except Misfit:
        pin(a, MISFIT)
        pin(b, MISFIT)
        return a
    for one, other in zip(mine, theirs, strict=True):
        unify(one, other)
    if a.root is not b.root:
        b.root.link = a.root
    return a.root
