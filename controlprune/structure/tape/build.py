"""From the tape to the `Structure`: which leaves of the axes are groups, and what is refused and why.

A leaf axis becomes a group if it is not pinned, at least one trainable parameter computes it (producer),
at least one parameter reads it, and every contraction over it is with parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ..extents import Extent, groups_in
from ..groups import LiveNorm, LiveRouter, Refusal, SizeAttribute, Structure, Work
from ..guards import Guard, Quantity, groups_of, reckoned
from .axes import MISFIT, Axis, leaves, pin
from .grouping import extent_of, groups_of_units, owner_of, partial, placed
from .seen import NUMBER, UNKNOWN, VALUE, Attribute, Computed, Size, Term
from .tape import MEET, Source, Tape, TracedWork

__all__ = ["COMPUTES", "build"]

PICKED = "a router picks some of its units, and its code cuts them into parts"
ALL = "a router picks every one of its units"
PIECES = "a slice, split or reshape of the model's code cuts it into single positions"
LISTED = "softmax runs over its units, and they are taken one by one: modules of a list can't leave it"
COMPUTED = "softmax runs over its units, and how many there are is a number that tensors are computed with"
COMPUTES = (
    "the model computes with its size as it runs (a scale?): make that a number it keeps, as self.scale"
)
RENEWED = "dynamic"
SHARED = "what computes it is used for more than this product of two activations"


def build(tape: Tape, ignored: Collection[str] = ()) -> Structure:
    """Decide every leaf of the tape's axes; `ignored` names tensors whose dimensions stay."""
    for name in ignored:
        for axis in tape.tensors[name]:
            pin(axis, "in ignored_layers")
    _pin_repeated(tape)
    _pin_unfit(tape)
    _pin_shared(tape)
    _pin_numbers(tape)
    _pin_renewed(tape)
    _pin_unread(tape)
    read = _sources_by_leaf(tape.reads_by_source())
    places = _places(tape)
    trainable = {name for name, p in tape.model.named_parameters() if p.requires_grad}
    for leaf, where in places.items():
        if not any(name in tape.used for name, _ in where):
            pin(leaf, "the forward on the example inputs does not use it")
        _pin_unprunable(leaf, where, read, partial(tape), trainable)
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


def _pin_renewed(tape: Tape) -> None:
    """Angles that transformers' rotary embeddings make anew, for all columns, once an input is long."""
    for path, module in tape.model.named_modules():
        kinds = getattr(module, "rope_type", None)
        if RENEWED in (kinds.values() if isinstance(kinds, dict) else [kinds]):
            for name, _ in module.named_buffers(prefix=path, recurse=False):
                for axis in tape.tensors.get(name, ()):
                    pin(axis, f"rope_type={RENEWED!r} makes angles of all columns anew when an input is long")


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


def _pin_unplaced(tape: Tape, numbers: dict[Axis, int]) -> None:
    """Positions that read have to be told by a term."""
    for source in partial(tape).keys() - placed(tape, numbers).keys():
        for event in tape.rows.events if tape.rows is not None else ():
            if source in event.where:
                pin(event.axis, MISFIT)


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


def _structure(
    tape: Tape, numbers: dict[Axis, int], places: dict[Axis, list[Source]], read: dict[Axis, set[Source]]
) -> Structure:
    tensors = {n: tuple(extent_of(axis, numbers) for axis in dims) for n, dims in tape.tensors.items()}
    known: dict[Axis, Extent] = {}
    work, traffic, activations = (
        [_work(traced, numbers, known) for traced in terms]
        for terms in (tape.work, tape.traffic, tape.activations)
    )
    attributes = tuple(
        SizeAttribute(module, attribute, index, extent)
        for (module, attribute, index), axis in tape.attributes.items()
        if groups_in(extent := extent_of(axis, numbers))
    )
    norms = tuple(
        LiveNorm(module, extent, tape.norms[module])
        for module, axis in tape.counted.items()
        if groups_in(extent := extent_of(axis, numbers))
    )
    routers = tuple(
        LiveRouter(name.rpartition(".")[0], name.rpartition(".")[2], extent)
        for name, axis in tape.routers.items()
        if groups_in(extent := extent_of(axis, numbers))
    )
    parameters = frozenset(name for name, _ in tape.model.named_parameters())
    plain = _sources_by_leaf(tape.reads_by_source(rows=False))
    refused = (*_refusals(places, plain, parameters), *_refused_routers(tape), *_refused_pieces(tape))
    return Structure(
        groups=groups_of_units(tape, numbers, places, read, tensors),
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


def _guards(tape: Tape, numbers: dict[Axis, int]) -> tuple[Guard, ...]:
    """What was asked that depends on the width of a group; of equals, nothing depends on it."""

    def quantity(term: Term) -> Quantity:
        match term:
            case Size(axis):
                return extent_of(axis, numbers)
            case Attribute(key, value):
                axis = tape.attributes.get(key)
                return value if axis is None or axis.size != value else extent_of(axis, numbers)
            case Computed(operator, terms):
                return reckoned(operator, tuple(map(quantity, terms)))
            case _:
                return term

    found: dict[Guard, None] = {}
    for question in tape.questions:
        terms = tuple(map(quantity, question.terms))
        guard = Guard(question.operator, terms, question.line)
        if groups_of(guard) and (len(terms) == 1 or terms[0] != terms[1]):
            found[guard] = None
    return tuple(found)


def _work(traced: TracedWork, numbers: dict[Axis, int], known: dict[Axis, Extent]) -> Work:
    for axis in traced.factors:
        if axis.root not in known:
            known[axis.root] = extent_of(axis, numbers)
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
    found: dict[tuple[str, int, str], dict[str, None]] = {}
    for leaf, where in places.items():
        producers = [name for name, d in where if name in parameters and (name, d) not in read.get(leaf, ())]
        if leaf.reason and producers:
            stand = found.setdefault((owner_of(producers[0]), leaf.size, leaf.reason), {})
            stand.update(dict.fromkeys(name for name, _ in where))
    return tuple(Refusal(*told, tuple(stand)) for told, stand in found.items())


def _refused_pieces(tape: Tape) -> tuple[Refusal, ...]:
    """Dimensions that parameters compute and of which nothing is left that is wider than 1."""
    reads = tape.reads_by_source()
    parameters = {name for name, _ in tape.model.named_parameters()} & tape.used
    found = {
        (owner_of(name), axis.size): None
        for name in tape.tensors
        if name in parameters
        for d, axis in enumerate(tape.tensors[name])
        if axis.size > 1 and not leaves(axis) and (name, d) not in reads
    }
    return tuple(Refusal(owner, size, PIECES) for owner, size in found)


def _refused_routers(tape: Tape) -> tuple[Refusal, ...]:
    """Those whose units stay for reasons that no other line tells."""
    return tuple(
        Refusal(owner_of(name), axis.size, LISTED)
        for name, axis in tape.routers.items()
        if axis.size > 1 and all(leaf.reason == "" for leaf in leaves(axis))
    )
