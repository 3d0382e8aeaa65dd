"""What the reader columns say of each unit: gate gradients and weight norms, dormant units included.

For a gate `g` multiplied onto the output of unit `i`, whatever the activation, in units of the loss,

    ∂L/∂g_i = Σ_{reader columns of i} ⟨w, ∂L/∂w⟩        (w parked where the unit is dormant)

since the columns are contracted with that output. A dormant unit's columns are zero in the masked layout,
but its rows still compute, so their gradient arrives: it is multiplied with the parked column, added to a
record and left out of what goes on to `.grad`. Between arrival and reading the user may rescale gradients
(unscaling, clipping by norm, zero_grad); the record follows by the ratio of ‖p.grad‖₁ now to ‖p.grad‖₁
after the last arrival (squares would leave float32 where gradients are tiny or huge).
Where gradients are averaged over replicas, an arrival counts once they are: `Later` puts it off till then.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from ..structure.extents import Extent, groups_in, keep, labels
from .cuts import at, heard, sent
from .hooks import Link
from .interrupts import uninterrupted
from .layout import Spot, fill_zero_
from .silence import Silence

__all__ = [
    "Bundle",
    "Gather",
    "Later",
    "Pair",
    "Watch",
    "gather",
    "inner",
    "per_unit",
    "select_others",
]

WIDE = (torch.float32, torch.float64)
SMALL = 2**16  # elements of a tensor that is multiplied together with others of its shape

Later: TypeAlias = Callable[[Callable[[], None]], None]
Pair: TypeAlias = "tuple[Tensor, Tensor | None]"  # a weight and its gradient, or itself


class Watch:
    """Gradients of the dormant columns of one parameter: read as they arrive, and left out.

    `record[d][j] = Σ_{other dimensions} w ∂w` at silent position j of dimension d, for the gradients now
    in `parameter.grad` and at their scale once `settle` has run. Where nothing is `expected`, gradients are
    left out and no more.
    """

    def __init__(
        self, spot: Spot, parameter: Tensor, later: Later | None = None, *, expected: bool = True
    ) -> None:
        assert spot.home is not None
        self.expected, self.current = expected, True  # current: the record is of what is in `.grad`
        self.parameter, self.home = parameter, spot.home
        self.later, self.pending = later, False
        self.silent = at(spot.cuts, "silent")
        self.silence = Silence(self.silent)
        self.record = {d: _zeros(len(index), parameter) for d, index in self.silent.items()}
        self.norm = _zeros((), parameter)
        self.version = -1
        self.awaited = False  # what arrived last is not in `.grad` yet
        self._known: Callable[[], Tensor | None] = lambda: None  # the gradient in which they are left out
        self.handles = [
            parameter.register_hook(Link(self, Watch.arrive)),
            parameter.register_post_accumulate_grad_hook(Link(self, Watch.landed)),
        ]

    def read(self, dim: int) -> Tensor:
        self.sweep()
        self.settle()
        return self.record[dim]

    @uninterrupted
    @torch.no_grad()
    def settle(self) -> None:
        """Bring the record to the scale `parameter.grad` has now."""
        if self.pending:
            return
        if self.parameter.grad is None or not self.current:
            self._forget()
            return
        now = _norm(self.parameter.grad)
        present = now > 0
        if self._untouched():
            present = present | (self.norm == 0)  # nothing but dormant units had a gradient
        ratio = torch.where(self.norm > 0, now / self.norm, 1.0)
        self.record = {d: torch.where(present, record * ratio, 0.0) for d, record in self.record.items()}
        self.norm = now

    def arrive(self, gradient: Tensor) -> Tensor | None:
        """A backward pass brings a gradient, to `.grad` or to who asked for it (`torch.autograd.grad`)."""
        by_hand, self.awaited = self.awaited, True
        if by_hand and self.expected:
            self._forget()
        elif self.expected:
            self.settle()
        self.current = self.expected
        if self.later is not None:
            return None
        self._add(gradient)
        gradient = self.silence.filled(gradient)
        if self.expected and (by_hand or self.parameter.grad is None):
            self.norm = _norm(gradient.detach())
        return gradient

    def landed(self, parameter: Tensor) -> None:
        """It is in `.grad`."""
        self.awaited = False
        if parameter.grad is None:  # a hook of the user's stepped with it, and cleared it
            self._forget()
        elif self.later is None:
            self._seen(parameter.grad)
        else:
            self.brought()

    def brought(self) -> None:
        """Dormant columns and all: averaged over replicas, or to the whole that this is a part of."""
        self.pending = True
        if self.later is None:
            self.sweep()
        else:
            self.later(self.sweep)

    @uninterrupted
    @torch.no_grad()
    def sweep(self) -> None:
        """What `.grad` holds for dormant columns is read and cleared: an average, or put there by hand."""
        gradient = self.parameter.grad
        if gradient is None or (self._known() is gradient and not self.pending):
            return
        if not self.pending and self.expected:
            self.settle()
        self.pending, self.current = False, self.expected
        self._add(gradient)
        self.silence.fill_(gradient)
        self._seen(gradient)

    @torch.no_grad()
    def _add(self, gradient: Tensor) -> None:
        if not self.expected:
            return
        for d, index in self.silent.items():
            others = {k: silent for k, silent in self.silent.items() if k != d}
            column = fill_zero_(self.home.index_select(d, index), others)
            self.record[d] = self.record[d] + inner(column, gradient.index_select(d, index), d)

    def _seen(self, gradient: Tensor) -> None:
        self._known, self.version = weakref.ref(gradient), gradient._version
        if self.expected:
            self.norm = _norm(gradient.detach())

    def _untouched(self) -> bool:
        """Is the gradient as it was left?"""
        gradient = self.parameter.grad
        return gradient is not None and self._known() is gradient and gradient._version == self.version

    def _forget(self) -> None:
        self.record = {d: torch.zeros_like(record) for d, record in self.record.items()}
        self.norm = torch.zeros_like(self.norm)


@dataclass(frozen=True)
class Gather:
    """From sums per position to sums per unit, for all reader dimensions at once, at the present masks.

    With the position vectors of the bundles one after the other in a vector x, `out[unit] += x[where]`, in
    the order of the model's tensors. A position counts for a unit only where every other group that stands
    there is live.
    """

    bundles: tuple[Bundle, ...]
    where: Tensor | None  # None: every position, in order
    unit: Tensor  # over all groups, one group after the other; like `where` in the narrowest integers
    units: int


@dataclass(frozen=True)
class Bundle:
    """A reader dimension of one tensor, or of all small ones of a kind: a call costs more than their few
    elements. Its positions as they lie now, or (then of one tensor) the parked (silent) ones."""

    spots: tuple[Spot, ...]
    dim: int
    parked: bool
    length: int  # in each


def gather(
    spots: Iterable[Spot], tensors: Mapping[str, Tensor], masks: Sequence[Tensor], compact: bool
) -> Gather:
    starts = [0, *itertools.accumulate(len(mask) for mask in masks)]
    places: list[Bundle] = []  # of one each, as they are found
    alike: dict[object, list[int]] = {}
    parked: list[list[int]] = []
    told: dict[tuple[Extent, Extent, frozenset[int], bool], _Told] = {}
    where, unit = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
    offset = 0
    for spot, dim in [(s, dim) for s in spots for dim in s.reads]:
        extent = spot.extents[dim]
        key = extent, spot.readers.get(dim, extent), spot.reads[dim], dim in spot.cuts
        one = told[key] = told.get(key) or _told(*key, masks, compact, starts)
        alike.setdefault(_kind(tensors[spot.name], dim, len(places)), []).append(len(places))
        places += [Bundle((spot,), dim, False, one.live)]
        if one.parked:
            parked.append([len(places)])
            places += [Bundle((spot,), dim, True, one.parked)]
        where, unit = [*where, one.where + offset], [*unit, one.unit]
        offset += one.live + one.parked
    together = [*alike.values(), *parked]
    index, whose = _moved([p.length for p in places], together)[torch.cat(where)], torch.cat(unit)
    ordered = len(index) == offset and bool((index == torch.arange(offset)).all())
    narrow = [_narrow(whose, starts[-1]), *([] if ordered else [_narrow(index, offset)])]
    there = sent(narrow, tensors[places[0].spots[0].name].device) if places else narrow
    spots_of = (tuple(places[k].spots[0] for k in which) for which in together)
    bundles = [
        replace(places[which[0]], spots=spots) for which, spots in zip(together, spots_of, strict=True)
    ]
    return Gather(tuple(bundles), None if ordered else there[1], there[0], starts[-1])


def _moved(lengths: Sequence[int], alike: Iterable[Sequence[int]]) -> Tensor:
    """Where every position of vectors one after the other goes, if they are put in the order of `alike`."""
    at = torch.arange(sum(lengths)).split(list(lengths))
    return torch.cat([at[k] for which in alike for k in which] or [torch.arange(0)]).argsort()


def per_unit(
    plan: Gather, pair: Callable[[Spot, int], Pair], parked: Callable[[Spot, int], Tensor | None]
) -> Tensor:
    """Σ of the products of each `pair` over what reads a unit, and of what is told of what is `parked`.

    Both are asked of a spot and a dimension. None: zeros.
    """
    with torch.no_grad():
        found = _inners(
            plan,
            {
                n: [pair(spot, bundle.dim) for spot in bundle.spots]
                for n, bundle in enumerate(plan.bundles)
                if not bundle.parked
            },
        )
        for n, bundle in enumerate(plan.bundles):
            if bundle.parked:
                found[n] = [parked(bundle.spots[0], bundle.dim)]
        return _to_units(plan, found)


def _to_units(plan: Gather, found: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """Sum for each unit of what was `found` in each bundle, None: zeros, all of float32."""
    device, silent = plan.unit.device, 0
    entries = [(b.length, values) for b, many in zip(plan.bundles, found, strict=True) for values in many]
    while entries and entries[-1][1] is None:  # what is parked, where it is not seen
        silent += entries.pop()[0]
    parts = [torch.zeros(n, device=device) if x is None else x.to(device) for n, x in entries]
    parts += [torch.zeros(silent, device=device)] if silent else []
    out = torch.zeros(plan.units, device=device)
    if parts:
        values = torch.cat(parts)
        values = values if plan.where is None else values.index_select(0, plan.where.int())
        out.index_add_(0, plan.unit.int(), values.to(out))
    return out


def select_others(tensor: Tensor, spot: Spot, dim: int) -> Tensor:
    """The live positions of every dimension but `dim`."""
    for d, index in at(spot.cuts, "live").items():
        if d != dim:
            tensor = tensor.index_select(d, index)
    return tensor


def _inners(plan: Gather, pairs: Mapping[int, Sequence[Pair]]) -> list[list[Tensor | None]]:
    """Of every bundle that has pairs, `inner` of each: bundle by bundle in one vector, where that can be."""
    found: list[list[Tensor | None]] = [[None] for _ in plan.bundles]
    whole = {n: many for n, many in pairs.items() if len(many) > 1 and _stackable(many)}
    products = _products([pair for many in whole.values() for pair in many])
    for n, many in pairs.items():
        dim = plan.bundles[n].dim
        if n in whole:
            stacked = torch.stack(list(itertools.islice(products[many[0][0].device], len(many))))
            found[n] = [_sum(stacked, 0, dim + 1).flatten()]
        else:
            found[n] = [None if b is None else inner(a, b, dim) for a, b in many]
    return found


def _stackable(pairs: Sequence[Pair]) -> bool:
    """Are they dense, of one shape and on one device, wherever the user took them since?"""
    device, shape = pairs[0][0].device, pairs[0][0].shape
    return all(
        b is not None and b.layout == torch.strided and a.device == device and a.shape == shape
        for a, b in pairs
    )


def _products(pairs: Iterable[Pair]) -> dict[torch.device, Iterator[Tensor]]:
    """Of real tensors, in order, all of a device in one call, in at least float32."""
    sides: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for a, b in pairs:
        if b is not None:
            first, second = sides.setdefault(a.device, ([], []))
            first.append(a if a.dtype in WIDE else a.float())
            second.append(b)
    multiply = torch._foreach_mul  # pyright: ignore[reportPrivateImportUsage]
    return {device: iter(multiply(first, second)) for device, (first, second) in sides.items()}


def inner(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Σ over all dimensions but `dim` of Re(a* b), in at least float32."""
    return _sum((a.conj() * b).real if a.is_complex() else a.to(_wide(a)) * b, dim)


def _sum(product: Tensor, *kept: int) -> Tensor:
    others = [d for d in range(product.ndim) if d not in kept]
    return product.sum(others) if others else product


@dataclass(frozen=True)
class _Told:
    """Of a reader dimension: how many positions it has, live and parked, and which tell of which unit."""

    live: int
    parked: int
    where: Tensor
    unit: Tensor


def _told(
    extent: Extent,
    reader: Extent,
    reads: frozenset[int],
    cut: bool,
    masks: Sequence[Tensor],
    compact: bool,
    starts: Sequence[int],
) -> _Told:
    live = keep(extent, masks)
    silent = (
        (~heard(reader, reads, masks)).nonzero().flatten() if cut else live.new_zeros(0, dtype=torch.int64)
    )
    length = int(live.sum()) if compact else len(live)
    where, unit = [], []
    for group in sorted(reads):
        units = labels(reader, group)
        others = {g: torch.ones_like(masks[g]) if g == group else masks[g] for g in groups_in(extent)}
        counted = (units >= 0) & keep(extent, others)
        here, gone = counted & live, counted & ~live
        live_at = (here[live] if compact else here).nonzero().flatten()
        parked_at = gone[silent].nonzero().flatten()
        where += [live_at, parked_at + length]
        unit += [units[here] + starts[group], units[silent[parked_at]] + starts[group]]
    return _Told(length, len(silent), torch.cat(where), torch.cat(unit))


def _kind(tensor: Tensor, dim: int, place: int) -> object:
    """Equal for small tensors that can be multiplied together."""
    small = tensor.numel() <= SMALL and tensor.layout == torch.strided and not tensor.is_complex()
    return (tensor.shape, tensor.dtype, tensor.device, dim) if small else place


def _narrow(index: Tensor, bound: int) -> Tensor:
    """`index`, all under `bound`, in few bytes: there is one for every position that is read."""
    return index.to(torch.int16 if bound <= 2**15 else torch.int32)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype in (torch.float64, torch.complex128) else torch.float32


def _zeros(shape: int | tuple[int, ...], like: Tensor) -> Tensor:
    return torch.zeros(shape, dtype=_wide(like), device=like.device)


def _norm(tensor: Tensor) -> Tensor:
    return tensor.abs().sum(dtype=_wide(tensor))
