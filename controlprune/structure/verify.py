"""The numeric check: what the rules derived, tried on the model itself with joint random masks.

Each draw (structure/draws.py) is a joint mask of all groups; structure/trial.py says whether masked and
shrunk agree under it. On a failure the guilty groups are found by bisection on that draw alone and refused:
first the groups of the module that raised against the others, then halves; groups that look alike mostly
fail together. It is through when every draw passes with what is left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .draws import at, draws, rounded
from .extents import Concat, Extent, Fixed, Product, Units, Window, groups_in, size
from .groups import Refusal, Slice, Structure, Work, widths_of
from .guards import Guard, Quantity, Reckoned, Unprovable, groups_of, unseen
from .record import ExampleInputs
from .tape.build import COMPUTES
from .tape.grouping import ALIGNED
from .tape.seen import FITS, NUMBER
from .trial import DIFFERS, FIXED, Failure, Trial
from .untouched import Memory
from .views import alike

__all__ = ["flops", "verify", "without"]

CHEAP = 10**9  # FLOPs of a forward pass under which groups meet at four sizes instead of one

Families = list[list[int]]


def verify(
    model: nn.Module,
    example_inputs: ExampleInputs,
    structure: Structure,
    seed: int = 0,
    *,
    trains: bool = False,
    infer: bool = True,
    memory: Memory | None = None,
) -> tuple[Structure, tuple[str, ...]]:
    """The structure without the groups for which masked and shrunk outputs disagree (in eval mode).

    `trains`: the forward also runs in training mode, and must when shrunk (its values are random there).
    `infer`: end at the first view that fails where its size could be inferred, with the modules that could.
    """
    if any(tensor.device.type == "meta" for tensor in model.parameters()):
        return replace(structure, verified=False), ()
    if not structure.groups:
        return structure, ()
    joint = draws(structure, seed, meetings=4 if flops(structure.work) < CHEAP else 1)
    trial = Trial(model, example_inputs, structure, seed, memory)
    check = _Check(structure, trial, joint, trains, infer)
    try:
        check.run()
    except _Infers as fails:
        return replace(structure, forwards=structure.forwards + trial.forwards), fails.modules
    groups = tuple(replace(g, multiple=check.multiples.get(n, 1)) for n, g in enumerate(structure.groups))
    left = without(replace(structure, groups=groups), check.refused)
    return replace(left, verified=True, forwards=structure.forwards + trial.forwards), ()


def flops(works: Sequence[Work]) -> float:
    """Of all, dense."""
    return sum(work.coefficient * math.prod(size(f) for f in work.factors) for work in works)


def _by_likeness(structure: Structure, numbers: Sequence[int]) -> Families:
    """Groups in the same places of the same code: their slices are alike but for numbers in the names."""
    found: dict[frozenset[object], list[int]] = {}
    for number in numbers:
        slices = structure.groups[number].slices
        key = frozenset(("".join(c for c in s.tensor if not c.isdigit()), s.dim) for s in slices)
        found.setdefault(key, []).append(number)
    return list(found.values())


class _Infers(Exception):
    """A view failed; these modules, of its class, could infer its size."""

    def __init__(self, modules: tuple[str, ...]) -> None:
        super().__init__(*modules)
        self.modules = modules


@dataclass
class _Check:
    structure: Structure
    trial: Trial
    draws: list[list[Tensor]]
    trains: bool
    infer: bool
    refused: dict[int, str] = field(default_factory=dict)
    multiples: dict[int, int] = field(default_factory=dict)  # widths that a kernel insists on

    def __post_init__(self) -> None:
        self.multiples.update({n: g.multiple for n, g in enumerate(self.structure.groups) if g.multiple > 1})

    def run(self) -> None:
        """Refuse until every draw passes with what is left, and draws of every kind are among them."""
        if self.structure.views:  # what is lost here may still be had without them
            self._forgo()
        passed: dict[int, list[int]] = {}
        while stale := self._stale(passed):
            self.bisect(stale[0], [], _by_likeness(self.structure, self.left))
            passed[stale[0]] = self.left

    def _forgo(self) -> None:
        """Refuse what can't be tried out, before any pass; but for views, which may yet infer sizes."""
        guards = [guard for guard in self.structure.guards if guard.operator != FITS]
        while True:
            try:
                unseen(guards, self._rungs(), [])
                return
            except Unprovable as reason:
                self.refused.update(dict.fromkeys(reason.groups, reason.reason))

    def _stale(self, passed: Mapping[int, list[int]]) -> list[int]:
        """Draws that have not passed with what is left; new ones where kinds of widths are missing."""
        while True:
            stale = [draw for draw in range(len(self.draws)) if passed.get(draw) != self.left]
            if stale:
                return stale
            seen = [widths_of(self.masks(draw, self.left)) for draw in range(len(self.draws))]
            try:
                missing = unseen(self.structure.guards, self._rungs(), seen)
            except Unprovable as reason:
                self.refused.update(dict.fromkeys(reason.groups, reason.reason))
                continue
            if not missing:
                return []
            first = len(self.draws)
            self.draws += [at(self.structure, first + k, widths) for k, widths in enumerate(missing)]

    def _rungs(self) -> list[NDArray[np.int64]]:
        """Per group, the widths that it may have."""
        steps = (
            self.multiples.get(g, 1) if g in self.left else n for g, n in enumerate(self.structure.sizes)
        )
        return [
            np.arange(max(step, -(-group.least // step) * step), group.size + 1, step)
            for step, group in zip(steps, self.structure.groups, strict=True)
        ]

    @property
    def left(self) -> list[int]:
        return [number for number in range(len(self.structure.groups)) if number not in self.refused]

    def bisect(self, draw: int, accepted: list[int], families: Families) -> list[int]:
        """Refuse what can't be accepted along with `accepted`; returns all that can."""
        candidates = [number for family in families for number in family]
        failure = self.failure(draw, [*accepted, *candidates]) if candidates else None
        if failure is None:
            return [*accepted, *candidates]
        if len(candidates) == 1:
            return self._alone(draw, accepted, candidates[0], failure)
        if len(families) == 1:
            return self._bisect_family(draw, accepted, families[0])
        for part in self._parted(families, failure.module):
            accepted = self.bisect(draw, accepted, part)
        return accepted

    def _parted(self, families: Families, module: str) -> tuple[Families, Families]:
        """Those that don't stand in the module that raised, and those that do; or halves."""
        inside = [family for family in families if module and self._stands_in(family[0], module)]
        outside = [family for family in families if family not in inside]
        half = len(families) // 2
        return (outside, inside) if inside and outside else (families[:half], families[half:])

    def _stands_in(self, number: int, module: str) -> bool:
        return any(part.tensor.startswith(module + ".") for part in self.structure.groups[number].slices)

    def _alone(self, draw: int, accepted: list[int], number: int, failure: Failure) -> list[int]:
        """Refuse the group, unless it fails only at widths that are no multiple of ALIGNED."""
        n = self.structure.groups[number].size
        if (
            failure.reason.startswith(FIXED)
            and n % ALIGNED == 0
            and n > ALIGNED
            and number not in self.multiples
        ):
            self.multiples[number] = ALIGNED
            if self.failure(draw, [*accepted, number]) is None:
                return [*accepted, number]
            del self.multiples[number]
        self.refused[number] = failure.reason + self._asked(number, failure)
        return accepted

    def _asked(self, number: int, failure: Failure) -> str:
        """The line that asks for its size, or computes with it, where that may be why outputs differ."""
        about = [guard for guard in self.structure.guards if number in groups_of(guard)]
        asking = [guard.line for guard in about if guard.operator != NUMBER]
        computing = [guard.line for guard in about if guard.operator == NUMBER]
        if failure.reason != DIFFERS or not about:
            return ""
        return f"; its size is asked for in {asking[0]}" if asking else f"; {COMPUTES}; {computing[0]}"

    def _bisect_family(self, draw: int, accepted: list[int], family: list[int]) -> list[int]:
        """The first two alone; what happens to both happens to their likenesses."""
        first, rest = family[:2], family[2:]
        for number in first:
            accepted = self.bisect(draw, accepted, [[number]])
        if rest and all(number in self.refused for number in first):
            self.refused.update(dict.fromkeys(rest, self.refused[first[0]]))
            return accepted
        if all(number in self.multiples for number in first):
            self.multiples.update(dict.fromkeys(rest, ALIGNED))
        half = (len(rest) + 1) // 2
        accepted = self.bisect(draw, accepted, [rest[:half]])
        return self.bisect(draw, accepted, [rest[half:]])

    def failure(self, draw: int, numbers: Sequence[int]) -> Failure | None:
        """Of masked against shrunk with the units of these groups off, those of the others on."""
        failure = self.trial.run(self.masks(draw, numbers), trains=self.trains and draw == 0)
        if failure is not None and failure.view and self.infer:
            could = alike(self.trial.model, [failure.module])
            if more := tuple(path for path in could if path not in self.structure.views):
                raise _Infers(more)
        return failure

    def masks(self, draw: int, numbers: Sequence[int]) -> list[Tensor]:
        return [
            rounded(mask, self.multiples.get(n, 1), self.structure.groups[n].least)
            if n in numbers
            else torch.ones_like(mask)
            for n, mask in enumerate(self.draws[draw])
        ]


def without(structure: Structure, reasons: Mapping[int, str]) -> Structure:
    """The structure with these groups refused: their units are fixed positions, the others renumbered."""
    if not reasons:
        return structure
    numbers = {
        old: new for new, old in enumerate(n for n in range(len(structure.groups)) if n not in reasons)
    }

    def cut(extent: Extent) -> Extent:
        match extent:
            case Fixed():
                return extent
            case Units(group, length):
                return Units(numbers[group], length) if group in numbers else Fixed(length)
            case Product(terms) | Concat(terms):
                inner = tuple(cut(term) for term in terms)
                if not any(groups_in(term) for term in inner):
                    return Fixed(size(extent))
                return type(extent)(inner)
            case Window():
                raise ValueError("a window of a sharded dimension belongs to no traced structure")

    def cut_quantity(term: Quantity) -> Quantity:
        if isinstance(term, Reckoned):
            return replace(term, terms=tuple(map(cut_quantity, term.terms)))
        return term if isinstance(term, (int, float)) else cut(term)

    def cut_guard(guard: Guard) -> Guard:
        return replace(guard, terms=tuple(map(cut_quantity, guard.terms)))

    def cut_slice(entry: Slice) -> Slice:
        return replace(entry, extent=cut(entry.extent))

    def cut_work(terms: Sequence[Work]) -> tuple[Work, ...]:
        return tuple(replace(w, factors=tuple(cut(factor) for factor in w.factors)) for w in terms)

    groups = tuple(
        replace(group, slices=tuple(cut_slice(entry) for entry in group.slices))
        for number, group in enumerate(structure.groups)
        if number in numbers
    )
    refused = [
        Refusal(g.name, g.size, reasons[n], tuple({s.tensor: None for s in g.slices}))
        for n, g in enumerate(structure.groups)
        if n in reasons
    ]
    attributes = tuple(replace(a, extent=cut(a.extent)) for a in structure.attributes)
    norms = tuple(replace(n, extent=cut(n.extent)) for n in structure.norms)
    routers = tuple(replace(r, extent=cut(r.extent)) for r in structure.routers)
    return replace(
        structure,
        groups=groups,
        refused=(*structure.refused, *refused),
        tensors={name: tuple(cut(extent) for extent in dims) for name, dims in structure.tensors.items()},
        attributes=tuple(a for a in attributes if groups_in(a.extent)),
        norms=tuple(n for n in norms if groups_in(n.extent)),
        routers=tuple(r for r in routers if groups_in(r.extent)),
        guards=tuple(map(cut_guard, structure.guards)),
        work=cut_work(structure.work),
        traffic=cut_work(structure.traffic),
        activations=cut_work(structure.activations),
    )
