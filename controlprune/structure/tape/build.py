"""From the tape to the `Structure`: which leaves of the axes are groups, and what is refused and why.

A leaf axis becomes a group if it is not pinned, at least one trainable parameter computes it (producer),
at least one parameter reads it, and every contraction over it is with parameters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import suppress

import torch
from torch import Tensor, nn

from ..extents import Concat, Extent, Fixed, Product, Units, groups_in, labels, only
from ..groups import Group, LiveNorm, LiveRouter, Refusal, SizeAttribute, Slice, Structure, Work
from ..guards import Guard, Quantity, Reckoned, groups_of
from .axes import MISFIT, Axis, factors_of, leaves, parts_of, pin
from .seen import NUMBER, UNKNOWN, VALUE, Attribute, Computed, Size, Term
from .tape import MEET, Source, Tape, TracedWork

__all__ = ["ALIGNED", "build"]

PICKED = "a router picks some of its units, and its code cuts them into parts"
ALL = "a router picks every one of its units"
LISTED = "softmax runs over its units, and they are taken one by one: modules of a list can't leave it"
COMPUTED = "softmax runs over its units, and how many there are is a number that tensors are computed with"
COMPUTES = (
    "the model computes with its size as it runs (a scale?): make that a number it keeps, as self.scale"
)
SHARED = "what computes it is used for more than this product of two activations"
ALIGNED = 8  # elements: grouped_mm wants rows of a multiple of 16 bytes


def build(tape: Tape, ignored: Collection[str] = ()) -> Structure:
    """Decide every leaf of the tape's axes; `ignored` names tensors whose dimensions stay."""
    for name in ignored:
        for axis in tape.tensors[name]:
            pin(axis, "in ignored_layers")
    _pin_repeated(tape)
    _pin_unfit(tape)
    _pin_shared(tape)
    _pin_numbers(tape)
    _pin_unread(tape)
    read = _sources_by_leaf(tape.reads_by_source())
    places = _places(tape)
    trainable = {name for name, p in tape.model.named_parameters() if p.requires_grad}
    for leaf, where in places.items():
        if not any(name in tape.used for name, _ in where):
            pin(leaf, "the forward on the example inputs does not use it")
        _pin_unprunable(leaf, where, read, _partial(tape), trainable)
    _pin_unplaced(tape, _numbers(places))
    return _structure(tape, _numbers(places), places, read)


def _numbers(places: Iterable[Axis]) -> dict[Axis, int]:
    """The leaves that are groups, numbered in their order."""
    return {leaf: n for n, leaf in enumerate(x for x in places if x.reason is None and x.size > 1)}


def _places(tape: Tape) -> dict[Axis, list[Source]]:
    """Where each leaf stands, in the order of the model's parameters."""
    places: dict[Axis, list[Source]] = {}
    for name, dims in tape.tensors.items():
        for d, axis in enumerate(dims):
            for leaf in dict.fromkeys(leaves(axis)):
                places.setdefault(leaf, []).append((name, d))
    return places


def _sources_by_leaf(events: dict[Source, list[Axis]]) -> dict[Axis, set[Source]]:
    found: dict[Axis, set[Source]] = {}
    for source, axes in events.items():
        for root in {axis.root for axis in axes}:
            for leaf in leaves(root):
                found.setdefault(leaf, set()).add(source)
    return found


def _pin_repeated(tape: Tape) -> None:
    """A dimension that is a leaf times itself has no mask of its own."""

    def visit(axis: Axis) -> set[Axis]:
        axis = axis.root
        if axis.parts:
            return set().union(*(visit(part) for part in axis.parts))
        if not axis.factors:
            return {axis}
        seen: set[Axis] = set()
        for found in map(visit, axis.factors):
            for leaf in seen & found:
                pin(leaf, "a dimension is this index space times itself")
            seen |= found
        return seen

    for dims in tape.tensors.values():
        for axis in dims:
            visit(axis)


def _pin_unfit(tape: Tape) -> None:
    """Units whose logits are used where -inf would do harm."""
    computed = {leaf for term in tape.numbers for axis in _axes_of(tape, term) for leaf in leaves(axis)}
    for name, axis in tape.routers.items():
        if name in tape.unfit:
            pin(axis, tape.unfit[name])
        elif name in tape.picks and (axis.root.factors or axis.root.parts):
            pin(axis, PICKED)
        elif tape.picks.get(name, 0) >= axis.size:
            pin(axis, ALL)
        elif computed.intersection(leaves(axis)):
            pin(axis, COMPUTED)


def _axes_of(tape: Tape, term: Term) -> list[Axis]:
    """The axes that a number is computed from."""
    match term:
        case Size(axis):
            return [axis]
        case Attribute(key, value):
            axis = tape.attributes.get(key)
            return [axis] if axis is not None and axis.size == value else []
        case Computed(_, terms):
            return [axis for inner in terms for axis in _axes_of(tape, inner)]
        case _:
            return []


def _pin_unread(tape: Tape) -> None:
    """Every leaf of a contracted axis must stand in a parameter dimension that is contracted there."""
    for event in tape.reads:
        covered = {leaf for source in event.sources for leaf in leaves(tape.covered(source))}
        for leaf in leaves(event.axis):
            if leaf not in covered:
                pin(leaf, MEET)


def _pin_shared(tape: Tape) -> None:
    """Rows that read a unit are heard by nothing else, and no parameter reads with them."""
    if tape.rows is None:
        return
    plain = {source for event in tape.reads if not event.rows for source in event.sources}
    read_twice = [event.axis for event in tape.rows.events if plain & event.where.keys()]
    for axis in (*tape.rows.shared(), *read_twice):
        pin(axis, SHARED)


def _pin_numbers(tape: Tape) -> None:
    """The size of what meets is no number that is computed with: the scale would be another."""
    events = () if tape.rows is None else tape.rows.events
    met = {leaf for event in events for leaf in leaves(event.axis)}
    for question in tape.questions if met else ():
        if question.operator in (NUMBER, UNKNOWN, VALUE):
            for leaf in met.intersection(x for term in question.terms for x in _leaves_in(tape, term)):
                pin(leaf, f"{COMPUTES}; {question.line}")


def _leaves_in(tape: Tape, term: Term) -> list[Axis]:
    """The leaves on whose sizes it depends."""
    match term:
        case Size(axis):
            return leaves(axis)
        case Attribute(key, value):
            axis = tape.attributes.get(key)
            return leaves(axis) if axis is not None and axis.size == value else []
        case Computed(_, terms):
            return [leaf for inner in terms for leaf in _leaves_in(tape, inner)]
        case _:
            return []


def _partial(tape: Tape) -> dict[Source, Tensor]:
    """Dimensions that read at some of their positions: which."""
    where = {} if tape.rows is None else tape.rows.where
    return {source: positions for source, positions in where.items() if not bool(positions.all())}


def _pin_unplaced(tape: Tape, numbers: dict[Axis, int]) -> None:
    """Positions that read have to be told by a term."""
    for source in _partial(tape).keys() - _placed(tape, numbers).keys():
        for event in tape.rows.events if tape.rows is not None else ():
            if source in event.where:
                pin(event.axis, MISFIT)


def _placed(tape: Tape, numbers: dict[Axis, int]) -> dict[Source, Extent]:
    """Of dimensions that read at some of their positions, what does, as a term."""
    found = {}
    for (name, d), where in _partial(tape).items():
        with suppress(ValueError):
            found[name, d] = only(_extent(tape.tensors[name][d], numbers), where)
    return found


def _pin_unprunable(
    leaf: Axis,
    where: list[Source],
    read: dict[Axis, set[Source]],
    partial: Collection[Source],
    trainable: set[str],
) -> None:
    readers = read.get(leaf, set())
    producers = [place for place in where if place not in readers or place in partial]
    if leaf.reason is not None:
        return
    if not any(place in readers for place in where):
        pin(leaf, "no parameter reads it")
    elif not producers:
        pin(leaf, "no parameter computes it")
    elif not any(name in trainable for name, _ in producers):
        pin(leaf, "what computes it is frozen")


def _extent(axis: Axis, numbers: dict[Axis, int]) -> Extent:
    """The axis as a term over groups; neighbours that are fixed are merged."""
    axis = axis.root
    if axis in numbers:
        return Units(numbers[axis], axis.size)
    children = factors_of(axis) if axis.factors else parts_of(axis) if axis.parts else []
    inner = [_extent(child, numbers) for child in children]
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


def _structure(
    tape: Tape, numbers: dict[Axis, int], places: dict[Axis, list[Source]], read: dict[Axis, set[Source]]
) -> Structure:
    tensors = {n: tuple(_extent(axis, numbers) for axis in dims) for n, dims in tape.tensors.items()}
    partial = _placed(tape, numbers)
    names: Counter[str] = Counter()
    picked = {tape.routers[name].root: k for name, k in sorted(tape.picks.items(), key=lambda pick: pick[1])}
    aligned, chosen = _aligned(tape), {leaf for axis in tape.routers.values() for leaf in leaves(axis)}
    met = {leaf for event in (tape.rows.events if tape.rows else ()) for leaf in leaves(event.axis)}
    kinds = dict(tape.model.named_modules())
    wide = {n for n, dims in tensors.items() if len(dims) > 1}
    groups = []
    for leaf in numbers:
        slices = []
        for tensor, d in places[leaf]:
            extent, reads = tensors[tensor][d], (tensor, d) in read.get(leaf, ())
            part = partial.get((tensor, d), extent) if reads else extent
            slices.append(Slice(tensor, d, part, "reader" if reads else "producer", part != extent))
            if part != extent and not torch.equal(*(labels(e, numbers[leaf]) for e in (part, extent))):
                slices.append(Slice(tensor, d, extent, "producer"))
        name, kind = _name(slices, numbers[leaf], kinds, wide)
        kind = "expert" if leaf in chosen else kind
        names[name] += 1
        name = name if names[name] == 1 else f"{name}:{names[name]}"
        multiple, least = ALIGNED if leaf in aligned else 1, picked.get(leaf, 0)
        groups.append(Group(name, leaf.size, kind, tuple(slices), multiple, least=least, met=leaf in met))
    known: dict[Axis, Extent] = {}
    work, traffic, activations = (
        [_work(traced, numbers, known) for traced in terms]
        for terms in (tape.work, tape.traffic, tape.activations)
    )
    attributes = tuple(
        SizeAttribute(module, attribute, index, extent)
        for (module, attribute, index), axis in tape.attributes.items()
        if groups_in(extent := _extent(axis, numbers))
    )
    norms = tuple(
        LiveNorm(module, extent, tape.norms[module])
        for module, axis in tape.counted.items()
        if groups_in(extent := _extent(axis, numbers))
    )
    routers = tuple(
        LiveRouter(name.rpartition(".")[0], name.rpartition(".")[2], extent)
        for name, axis in tape.routers.items()
        if groups_in(extent := _extent(axis, numbers))
    )
    parameters = frozenset(name for name, _ in tape.model.named_parameters())
    plain = _sources_by_leaf(tape.reads_by_source(rows=False))
    refused = (*_refusals(places, plain, parameters), *_refused_routers(tape))
    return Structure(
        groups=tuple(groups),
        refused=refused,
        tensors=tensors,
        parameters=parameters,
        attributes=attributes,
        work=tuple(work),
        traffic=merged(traffic),
        activations=tuple(activations),
        aliases=dict(tape.aliases),
        norms=norms,
        routers=routers,
        guards=_guards(tape, numbers),
        asked=dict(tape.asked),
    )


def _aligned(tape: Tape) -> set[Axis]:
    """Leaves that are rows of a kernel that wants them in steps; of products, the check finds out."""
    found = {part.root for axis in tape.aligned for part in parts_of(axis)}
    return {leaf for leaf in found if not leaf.factors and leaf.size % ALIGNED == 0 and leaf.size > ALIGNED}


def _guards(tape: Tape, numbers: dict[Axis, int]) -> tuple[Guard, ...]:
    """What was asked that depends on the width of a group; of equals, nothing depends on it."""

    def quantity(term: Term) -> Quantity:
        match term:
            case Size(axis):
                return _extent(axis, numbers)
            case Attribute(key, value):
                axis = tape.attributes.get(key)
                return value if axis is None or axis.size != value else _extent(axis, numbers)
            case Computed(operator, terms):
                return Reckoned(operator, tuple(map(quantity, terms)))
            case _:
                return term

    found: dict[Guard, None] = {}
    for question in (question for question in tape.questions if question.operator != NUMBER):
        terms = tuple(map(quantity, question.terms))
        guard = Guard(question.operator, terms, question.line)
        if groups_of(guard) and (len(terms) == 1 or terms[0] != terms[1]):
            found[guard] = None
    return tuple(found)


def _work(traced: TracedWork, numbers: dict[Axis, int], known: dict[Axis, Extent]) -> Work:
    for axis in traced.factors:
        if axis.root not in known:
            known[axis.root] = _extent(axis, numbers)
    factors = tuple(known[axis.root] for axis in traced.factors)
    return Work(traced.where, traced.operator, traced.coefficient, factors, traced.weights)


def merged(terms: Iterable[Work]) -> tuple[Work, ...]:
    """Terms of the same operator, place and factors added up."""
    total: dict[tuple[str, str, tuple[Extent, ...]], float] = {}
    for term in terms:
        key = (term.where, term.operator, term.factors)
        total[key] = total.get(key, 0) + term.coefficient
    return tuple(Work(where, operator, n, factors) for (where, operator, factors), n in total.items())


def _refusals(
    places: dict[Axis, list[Source]], read: dict[Axis, set[Source]], parameters: frozenset[str]
) -> tuple[Refusal, ...]:
    """One line for each pinned axis that parameters compute; one tensor dimension is told once per reason."""
    found: dict[tuple[str, str, int], None] = {}
    for leaf, where in places.items():
        producers = [name for name, d in where if name in parameters and (name, d) not in read.get(leaf, ())]
        if leaf.reason and producers:
            found[(_owner(producers[0]), leaf.reason, leaf.size)] = None
    return tuple(Refusal(name, size, reason) for name, reason, size in found)


def _refused_routers(tape: Tape) -> tuple[Refusal, ...]:
    """Those whose units stay for reasons that no other line tells."""
    return tuple(
        Refusal(_owner(name), axis.size, LISTED)
        for name, axis in tape.routers.items()
        if axis.size > 1 and all(leaf.reason == "" for leaf in leaves(axis))
    )


def _owner(tensor: str) -> str:
    """Module path of a tensor; the tensor itself where it stands at the top."""
    return tensor.rpartition(".")[0] or tensor


def _name(slices: list[Slice], group: int, modules: dict[str, nn.Module], wide: set[str]) -> tuple[str, str]:
    """(name, kind) of a group, by the first tensor that computes it (`wide`: those that are no vectors)."""
    producers = [s for s in slices if s.role == "producer"]
    matrices = [s for s in producers if not isinstance(s.extent, Fixed) and s.tensor.endswith("weight")]
    first = next((s for s in matrices if s.tensor in wide), (matrices or producers)[0])
    owner = _owner(first.tensor)
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
