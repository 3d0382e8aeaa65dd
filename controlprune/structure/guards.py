"""Guards: what the model's code asks about widths, and the kinds of width patterns that it tells apart.

    h.shape[1] % 2 == 0      ->      eq(mod(n_g, 2), 0)
    range(h.shape[1] // 4)   ->      value(floordiv(n_g, 4))

The answers to all its guards are the kind of a width pattern; within a kind the code takes one path. Guards
that share groups are asked together: for one group every width is tried, for two every pair (of many: small
ones, wide ones, equal ones). The numeric check has to see each kind; what cannot be tried out so is refused.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .extents import Concat, Extent, Fixed, Product, Units, groups_in

__all__ = ["Guard", "Place", "Quantity", "Reckoned", "Unprovable", "groups_of", "reckoned", "unseen"]

PAIRS = 2**18  # of widths that are all tried
SOME = 96  # widths of each where there are more
MOST_KINDS = 24  # of guards that share groups
SHOWN = 2  # width patterns that show a kind
LOST = "the model's code makes another number of its size, which cannot be followed"
MANY = "the model's code asks about its size in more ways than can be tried"

Place: TypeAlias = tuple[str | int | None, ...]  # file, function, lines and columns
Widths: TypeAlias = "Sequence[Any]"  # one per group: numbers, or arrays of them


@dataclass(frozen=True)
class Reckoned:
    """`operator` (a function of numpy's or Python's) of the terms."""

    operator: str
    terms: tuple[Quantity, ...]


FUNCTIONS = {
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul")},
    **{name: getattr(operator, name) for name in ("truediv", "floordiv", "mod", "neg", "abs")},
    **{name: getattr(operator, name) for name in ("and_", "or_", "xor", "lshift", "rshift")},
    **{name: getattr(np, name) for name in ("ceil", "floor", "trunc")},
    "fits": operator.eq,
    "pow": np.float_power,
}
Quantity: TypeAlias = "Extent | Reckoned | int | float"


@dataclass(frozen=True)
class Guard:
    """`operator` of the terms is asked in the line of the user's code.

    "truth", "value": if it is zero, what it is; "fits": is a number that is given as a size the size?
    "unknown": something is asked. "number": it is computed with, which tells no kinds apart.
    """

    operator: str
    terms: tuple[Quantity, ...]
    line: str


class Unprovable(Exception):
    """There are too many kinds, or they can't be told: why, and of which groups."""

    def __init__(self, reason: str, groups: Collection[int] = ()) -> None:
        super().__init__(reason)
        self.reason, self.groups = reason, groups


def reckoned(operator: str, terms: tuple[Quantity, ...]) -> Quantity:
    """`operator` of the terms: a product of lengths is a length, and so is what is left without a factor."""
    lengths = [factors for term in terms if (factors := _factors(term)) is not None]
    if len(lengths) == len(terms) and operator == "mul":
        return _product([factor for factors in lengths for factor in factors])
    if len(lengths) == len(terms) and operator in ("mod", "floordiv"):
        whole, parts = map(Counter, lengths)
        if parts <= whole:
            return 0 if operator == "mod" else _product([*(whole - parts).elements()])
    return Reckoned(operator, terms)


def _factors(term: Quantity) -> Sequence[Extent] | None:
    """Of a length; None: it is none."""
    match term:
        case Product(factors):
            return factors
        case Reckoned() | float():
            return None
        case int():
            return () if term == 1 else (Fixed(term),)
        case _:
            return (term,)


def _product(factors: Sequence[Extent]) -> Quantity:
    return factors[0] if len(factors) == 1 else Product(tuple(factors)) if factors else 1


def groups_of(quantity: Quantity | Guard) -> set[int]:
    """The groups whose widths it depends on."""
    if isinstance(quantity, (Reckoned, Guard)):
        return set().union(*(groups_of(term) for term in quantity.terms))
    return set() if isinstance(quantity, (int, float)) else set(groups_in(quantity))


def unseen(
    guards: Collection[Guard], rungs: Sequence[NDArray[np.int64]], seen: Collection[Sequence[int]]
) -> list[dict[int, int]]:
    """Widths {group: n} that show each kind not among the `seen` width patterns, `SHOWN` times.

    `rungs`: the widths that each group may have, dense last (a group that stays has that alone). `Unprovable`
    where kinds can't be told.
    """
    columns: list[dict[int, int]] = []
    guards = [guard for guard in guards if guard.operator != "number"]
    guards = [guard for guard in guards if guard.operator != "fits" or not _always(guard, rungs)]
    free = {g for g, widths in enumerate(rungs) if len(widths) > 1}
    for groups, together in _components(guards, free):
        missing = _unseen_of(groups, together, rungs, seen)
        columns += [{} for _ in range(len(missing) - len(columns))]
        for column, widths in zip(columns, missing, strict=False):
            column.update(zip(groups, widths, strict=True))
    return columns


def _components(
    guards: Collection[Guard], free: set[int]
) -> Iterator[tuple[tuple[int, ...], tuple[Guard, ...]]]:
    """Guards that share free groups, with these."""
    left = [(groups_of(guard) & free, guard) for guard in dict.fromkeys(guards)]
    while left:
        groups, guard = left.pop(0)
        together = [guard]
        while near := [entry for entry in left if entry[0] & groups]:
            left = [entry for entry in left if not entry[0] & groups]
            groups = groups.union(*(more for more, _ in near))
            together += [other for _, other in near]
        if groups:
            yield tuple(sorted(groups)), tuple(together)


def _unseen_of(
    groups: tuple[int, ...],
    guards: tuple[Guard, ...],
    rungs: Sequence[NDArray[np.int64]],
    seen: Collection[Sequence[int]],
) -> list[list[int]]:
    for guard in guards:
        if guard.operator == "unknown":
            raise Unprovable(f"{LOST}; {guard.line}", groups)
    if len(groups) > 2:
        raise Unprovable(f"{MANY}; {guards[0].line}", groups)
    tried = _tried([rungs[g] for g in groups])
    widths: list[Any] = [axis[-1] for axis in rungs]
    for g, column in zip(groups, tried, strict=True):
        widths[g] = column
    answers = np.stack([np.broadcast_to(_asked(guard, widths), tried[0].shape) for guard in guards], axis=1)
    kinds, kind = np.unique(answers, axis=0, return_inverse=True)
    if len(kinds) > MOST_KINDS:
        lost = next((guard for guard in guards if guard.operator == "value"), None)
        raise Unprovable(f"{MANY}; {guards[0].line}" if lost is None else f"{LOST}; {lost.line}", groups)
    known = {_kind(guards, pattern) for pattern in seen}
    patterns = np.stack(tried, axis=1)
    found = []
    for number, row in enumerate(kinds):
        own = patterns[kind.reshape(-1) == number]
        only_dense = len(own) == 1 and all(n == rungs[g][-1] for n, g in zip(own[0], groups, strict=True))
        if tuple(map(float, row)) not in known and not only_dense:
            places = np.unique(np.linspace(0, len(own) - 1, SHOWN).astype(int))
            found += [list(map(int, own[place])) for place in places]
    return found


def _always(guard: Guard, rungs: Sequence[NDArray[np.int64]]) -> bool:
    """Does what is given as a size fit at all widths, as far as many of them tell?"""
    random = np.random.default_rng(0)
    return bool(np.all(_asked(guard, [random.choice(axis, SOME**2) for axis in rungs])))


def _kind(guards: tuple[Guard, ...], widths: Sequence[int]) -> tuple[float, ...]:
    return tuple(float(_asked(guard, [np.int64(n) for n in widths])) for guard in guards)


def _tried(axes: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """All combinations of the widths, or of some of them, as columns."""
    if math.prod(map(len, axes)) > PAIRS:
        common = set.intersection(*(set(axis.tolist()) for axis in axes))
        spread = sorted(common)[:: max(len(common) // SOME, 1)]
        axes = [
            np.unique(np.concatenate([axis[:SOME], axis[-SOME:], spread])).astype(np.int64) for axis in axes
        ]
    return [grid.reshape(-1) for grid in np.meshgrid(*axes, indexing="ij")]


def _asked(guard: Guard, widths: Widths) -> Any:
    with np.errstate(all="ignore"):  # what would divide by zero is asked at no width that is reached
        values = [_value(term, widths) for term in guard.terms]
        match guard.operator:
            case "truth":
                return values[0] != 0
            case "value":
                return np.nan_to_num(values[0])
            case _:
                return FUNCTIONS[guard.operator](*values)


def _value(term: Quantity, widths: Widths) -> Any:
    match term:
        case Reckoned(operator, terms):
            return FUNCTIONS[operator](*(_value(inner, widths) for inner in terms))
        case int() | float():
            return term
        case Fixed(length):
            return length
        case Units(group):
            return widths[group]
        case Product(terms):
            return math.prod(_value(inner, widths) for inner in terms)
        case Concat(terms):
            return sum(_value(inner, widths) for inner in terms)
        case _:
            raise TypeError(f"{term!r} is no quantity of a traced structure")
