"""The tape: what one or more forward passes of a model say about its index spaces.

Every tensor seen has one `Dim` per dimension (dims.py): its `Axis`, and what its entries are views of.

`Tape` holds the facts; the rules (`rules_*.py`) write them, `structure/tape/build.py` reads them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor, maybe_get_bdim
from torch.utils.weak import WeakIdKeyDictionary

from ..formula import Formula
from ..guards import Place
from ..tape import axes
from .axes import Axis, Misfit
from .dims import ENDS, OFF, Dim, Dims, Source
from .memory import named_tensors, storage_of, view_key
from .rows import Rows
from .seen import Question, Term

__all__ = [
    "ENDS",
    "MEET",
    "OFF",
    "SCALE",
    "Call",
    "Dim",
    "Dims",
    "Operands",
    "Read",
    "Rule",
    "Source",
    "Tape",
    "TracedWork",
]

MEET = "two activations are multiplied and summed over it (as queries and keys are)"
SCALE = (
    "the scale of attention follows from its size where none is given (scaled_dot_product_attention, "
    "nn.MultiheadAttention): write scale=self.scale, a number"
)

T = TypeVar("T")
Operands: TypeAlias = Sequence[tuple[Tensor, int]]
UNWRITTEN = ("aten::empty", "aten::new_empty")  # memory without contents


@dataclass(frozen=True)
class Read:
    """`axis` is contracted with the parameter dimensions `sources`, or with what their rows make."""

    axis: Axis
    sources: frozenset[Source]
    rows: bool = False


@dataclass(frozen=True)
class TracedWork:
    """FLOPs of one operator, or bytes that it writes: coefficient × Π sizes of the axes."""

    where: str
    operator: str
    coefficient: int
    factors: tuple[Axis, ...]
    weights: tuple[str, ...] = ()  # parameters that it contracts with


@dataclass
class Entry:
    """What is known of a tensor. `weight`: computed from parameters alone, the same in every forward."""

    dims: Dims
    weight: bool = False
    pending: list[tuple[Axis, str]] = field(default_factory=list)  # pins due once the tensor is used
    labels: str = ""  # its values are positions of what this router chooses among, none of a unit that is off

    @property
    def routers(self) -> set[str]:
        """Whose logits, weights or labels it holds."""
        weights = (dim.routers for dim in self.dims)
        return {self.labels, *(dim.logits for dim in self.dims)}.union(*weights) - {""}


@dataclass
class Call:
    """One operator call as a rule sees it: arguments by their names in the operator's schema."""

    name: str
    arguments: dict[str, object]
    outputs: list[Tensor]
    entries: dict[int, Entry]  # id(tensor argument) -> entry
    pending: list[tuple[Axis, str]] = field(default_factory=list)  # pins due once an output is used
    storages: frozenset[int] = frozenset()  # of the tensor arguments
    writes: bool = False  # it changes an argument in place
    labels: list[str] = field(default_factory=list)  # of each output, as far as they go
    counts: bool = False  # labels are counted in it, or tell what is taken, and no more is done with them

    def dims(self, argument: str) -> Dims:
        return self.entries[id(self.arguments[argument])].dims

    def has(self, argument: str) -> bool:
        return isinstance(self.arguments.get(argument), Tensor)

    def label(self, argument: str) -> str:
        return self.entries[id(self.arguments[argument])].labels

    def weight(self, argument: str) -> bool:
        return self.entries[id(self.arguments[argument])].weight

    def integer(self, argument: str) -> int:
        value = self.arguments[argument]
        assert isinstance(value, int)
        return value

    def integers(self, argument: str) -> list[int]:
        value = self.arguments[argument]
        return [value] if isinstance(value, int) else list(value)  # type: ignore[call-overload]

    def tensors(self, argument: str) -> list[Dims]:
        return [self.entries[id(tensor)].dims for tensor in self.arguments[argument]]  # type: ignore[union-attr]

    @property
    def shape(self) -> torch.Size:
        """Shape of the first output."""
        return self.outputs[0].shape


@dataclass
class Tape:
    """Facts of a trace, and the verbs that rules use to add to them."""

    model: nn.Module
    tensors: dict[str, list[Axis]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    reads: list[Read] = field(default_factory=list)
    work: list[TracedWork] = field(default_factory=list)
    traffic: list[TracedWork] = field(default_factory=list)
    activations: list[TracedWork] = field(default_factory=list)
    attributes: dict[tuple[str, str, int | None], Axis] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)  # parameters and buffers that some operator was given
    routers: dict[str, Axis] = field(default_factory=dict)  # parameters whose logits must be able to lose
    unfit: dict[str, str] = field(default_factory=dict)  # parameters whose logits must not be -inf, and why
    picks: dict[str, int] = field(default_factory=dict)  # how many units a router picks, the most of it
    grouped: dict[Axis, Read] = field(default_factory=dict)  # what reads the units that a router picks
    norms: dict[str, Formula] = field(default_factory=dict)  # modules that can count live units
    aligned: list[Axis] = field(default_factory=list)  # lengths of rows that a kernel wants in its steps
    counted: dict[str, Axis] = field(default_factory=dict)  # and the channels that they did so over
    questions: list[Question] = field(default_factory=list)  # what the model's code asked about sizes
    numbers: list[Term] = field(default_factory=list)  # that tensors were multiplied with, and the like
    asked: Counter[Place] = field(default_factory=Counter)  # where, and how often in one pass
    given: bool = False  # the bounds of the slice that is taken are numbers that modules keep
    rows: Rows | None = None  # where units of two activations that meet are asked for
    unscaled: bool = False  # an attention runs that was given no scale
    where: str = ""
    counting: bool = True

    def __post_init__(self) -> None:
        self._entries: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._views: dict[tuple[object, ...], str] = {}
        self._named: dict[str, Entry] = {}
        self._owners: dict[int, str] = {}
        self._contracted: frozenset[Source] = frozenset()  # with what, at the last contraction
        for name, tensor, is_parameter in named_tensors(self.model):
            self._register(name, tensor, is_parameter)

    def _register(self, name: str, tensor: Tensor, is_parameter: bool) -> None:
        if (owner := self._owners.get(id(tensor))) is not None:
            self.aliases[name] = owner
            return
        self._owners[id(tensor)] = name
        self.tensors[name] = [Axis(length) for length in tensor.shape]
        dims = [
            Dim(axis, frozenset({(name, d)}) if is_parameter else frozenset())
            for d, axis in enumerate(self.tensors[name])
        ]
        self._entries[tensor] = Entry(dims, weight=True)
        if self.rows is not None and is_parameter:
            self.rows.own(name, tensor)
        if (key := view_key(tensor)) is not None:
            self._views.setdefault(key, name)
            self._named.setdefault(name, self._entries[tensor])

    # --- tensors ---------------------------------------------------------------------------------

    def entry(self, tensor: Tensor) -> Entry:
        """What is known of the tensor; one never seen before is a constant of the model's code."""
        if is_functorch_wrapped_tensor(tensor):
            inner = self.entry(get_unwrapped(tensor))
            return Entry(_seen_inside(tensor, inner.dims), inner.weight, labels=inner.labels)
        known = self._entries.get(tensor)
        if known is not None and len(known.dims) == tensor.dim():
            if (owner := self._owners.get(id(tensor))) is not None:
                self.used.add(owner)
            while known.pending:
                axes.pin(*known.pending.pop())
            return known
        name = self._views.get(key) if (key := view_key(tensor)) is not None else None
        if name is not None:
            self.used.add(name)
            return self._named[name]
        reason = "it meets a tensor that the model keeps outside its parameters and buffers"
        entry = Entry([Dim(Axis(length, reason)) for length in tensor.shape], weight=True)
        self._entries[tensor] = entry
        return entry

    def asks(self, questions: Sequence[Question]) -> None:
        """What was asked in one pass."""
        self.questions += questions
        self.asked |= Counter(question.place for question in questions)

    def axes_of(self, tensor: Tensor) -> list[Axis] | None:
        """Its axes where they are known; to look at them is no use of it."""
        if is_functorch_wrapped_tensor(tensor):
            inner = self.axes_of(get_unwrapped(tensor))
            return None if inner is None else _seen_inside(tensor, inner)
        known = self._entries.get(tensor)
        if known is None and (key := view_key(tensor)) is not None and key in self._views:
            known = self._named[self._views[key]]
        fits = known is not None and len(known.dims) == tensor.dim()
        return [dim.axis for dim in known.dims] if known is not None and fits else None

    def set(
        self,
        tensor: Tensor,
        dims: Dims,
        weight: bool,
        pending: Iterable[tuple[Axis, str]] = (),
        labels: str = "",
    ) -> None:
        if id(tensor) not in self._owners:
            self._entries[tensor] = Entry(dims, weight, list(pending), labels)

    def alive(self) -> list[Entry]:
        """What is known of all tensors that are still there."""
        return list(self._entries.values())

    def owned(self, tensor: Tensor) -> bool:
        """Is it a parameter or buffer of the model?"""
        return id(tensor) in self._owners

    def reads_by_source(self, *, rows: bool = True) -> dict[Source, list[Axis]]:
        """Source -> axes that it reads (`rows`: also those that its rows read)."""
        found: dict[Source, list[Axis]] = {}
        for read in (read for read in self.reads if rows or not read.rows):
            for source in read.sources:
                found.setdefault(source, []).append(read.axis)
        return found

    # --- verbs -----------------------------------------------------------------------------------

    def pin(self, axis: Axis, reason: str) -> None:
        axes.pin(axis, self._placed(reason))

    def pin_if_used(self, call: Call, axis: Axis, reason: str) -> None:
        """Pin it once an output of the call is used: averages that nobody looks at say nothing."""
        call.pending.append((axis, self._placed(reason)))

    def _placed(self, reason: str) -> str:
        return reason + (f" (in {self.where})" if reason and self.where else "")

    def linear(self, given: Tensor, weight: object) -> None:
        """The tensor is what torch's linear function makes with this weight; of the running module's own?"""
        name, known = self._owners.get(id(weight), ""), self._entries.get(given)
        if name and name.rpartition(".")[0] == self.where and known is not None and known.dims:
            known.dims = [*known.dims[:-1], replace(known.dims[-1], logits=name)]

    def loses(self, dim: Dim) -> str:
        """The router by which what is off loses against what is on in this dimension; "" if none does."""
        if dim.logits:
            self.routers[dim.logits] = dim.axis
        return dim.picks if self.chooses(dim.picks, dim) else ""

    def chooses(self, router: str, dim: Dim) -> bool:
        """Is it the very dimension that the router chooses among, not one that was made of it?"""
        return router in self.routers and self.routers[router].root is dim.axis.root

    def taken(self, tensor: Tensor, reason: str) -> None:
        """Its values go where they are not followed."""
        known = self._entries.get(tensor)
        for router in () if known is None else known.routers:
            self.unfit.setdefault(router, reason)

    def covered(self, source: Source) -> Axis:
        """The axis that is zero where the source is."""
        name, dim = source
        return self.routers[name] if dim < 0 else self.tensors[name][dim]

    def statistics(self, axis: Axis, reason: str, channels: Axis | None = None) -> None:
        """The operator reduces over `axis`: the statistics of a norm (its channels: `channels`), or a pin."""
        if self.where not in self.norms:
            self.pin(axis, reason)
            return
        formula = self.norms[self.where]
        if channels is None and formula.groups and formula.gain is not None:  # of one group, channels last
            channels = self.tensors[f"{self.where}.{formula.gain}"][0]
        channels = axis if channels is None else channels
        self.counted[self.where] = self.unify(channels, self.counted.get(self.where, channels))

    def picked(self, read: Read, *, matrix: bool) -> None:
        """Parameters meet what a router picked: the last of matrices, and biases after it, read the units."""
        axis = read.axis.root
        known = next((r for a, r in self.grouped.items() if a.root is axis), None)
        for one in [one for one in self.grouped if one.root is axis]:
            del self.grouped[one]
        more = frozenset() if known is None or matrix else known.sources
        self.grouped[axis] = Read(axis, read.sources | more)

    def pin_dims(self, dims: Iterable[Dim], reason: str) -> None:
        for dim in dims:
            self.pin(dim.axis, reason)

    def unify(self, *group: Axis) -> Axis:
        first = group[0]
        for other in group[1:]:
            first = axes.unify(first, other)
        return first

    def regroup(self, old: Sequence[Axis], sizes: Sequence[int]) -> list[Axis]:
        """`axes.regroup`, pinning everything where it can't be done."""
        try:
            return axes.regroup(old, sizes)
        except Misfit:
            for axis in old:
                self.pin(axis, axes.MISFIT)
            return [Axis(length, axes.MISFIT) for length in sizes]

    def segment(self, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
        """`axes.segment`, pinning everything where it can't be done."""
        try:
            return axes.segment(axis, sizes)
        except Misfit:
            self.pin(axis, axes.MISFIT)
            return [Axis(length, axes.MISFIT) for length in sizes]

    def contract(self, left: Dim, right: Dim, *, weight_first: bool = False, operands: Operands = ()) -> Axis:
        """The product of two tensors is summed over this dimension of both (`operands`: them, and which)."""
        axis = self.unify(left.axis, right.axis)
        order = (left, right) if weight_first else (right, left)
        reader = next((dim for dim in order if dim.parameters), None)
        self._contracted = left.parameters | right.parameters
        known: frozenset[Source] = frozenset((name, OFF) for dim in order for name in dim.routers)
        if reader is not None:
            known |= reader.parameters
        if known:
            self.reads.append(Read(axis, known))
        else:
            self._meet(axis, operands)
        return axis

    def _meet(self, axis: Axis, operands: Operands) -> None:
        """Two activations: what makes one of them reads the axis, where that is asked for."""
        sources = self.rows.read(axis, operands) if self.rows is not None else frozenset()
        if sources and not self.unscaled:
            self.reads.append(Read(axis, sources, rows=True))
        else:
            self.pin(axis, SCALE if sources else MEET)

    def count(self, operator: str, coefficient: int, *factors: Axis) -> None:
        """Record FLOPs = coefficient × Π sizes."""
        if self.counting:
            weights = tuple(sorted({name for name, _ in self._contracted}))
            self.work.append(TracedWork(self.where, operator, coefficient, factors, weights))

    def write(self, call: Call, output: Tensor, dims: Dims) -> None:
        """Record what the operator writes in eval mode, and what it allocates in training mode."""
        new = storage_of(output) not in call.storages
        axes = tuple(dim.axis for dim in dims)
        if self.counting and (new or call.writes) and not call.name.startswith(UNWRITTEN):
            self.traffic.append(TracedWork(self.where, call.name, output.element_size(), axes))
        elif new and not self.counting:
            self.activations.append(TracedWork(self.where, call.name, output.element_size(), axes))

    def bind(self, module: str, attribute: str, index: int | None, axis: Axis) -> None:
        """`module.attribute` is the size of `axis`; two axes of one attribute are one axis."""
        key = (module, attribute, index)
        known = self.attributes.get(key)
        if known is None or known.size != axis.size:
            self.attributes.setdefault(key, axis)
        else:
            self.unify(known, axis)


Rule: TypeAlias = Callable[[Tape, Call], "list[Dims]"]


def _seen_inside(tensor: Tensor, all_of_it: list[T]) -> list[T]:
    """Without the dimension that torch.vmap hides from the function it maps."""
    hidden = maybe_get_bdim(tensor)  # -1: of another transform
    return [one for d, one in enumerate(all_of_it) if d != hidden]
