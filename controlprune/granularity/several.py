"""Several granularities at once: {module or name: granularity}, "" for the whole model.

A parameter belongs to the innermost module that is named, and to one granularity only. A group of channels,
or a branch, that stands in parameters of another owner, or of none, is left alone; where nothing is left of a
module that was named, that is an error. The vector of units is that of all granularities one after the other,
and one budget bounds the sum of what they cost.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.optim import Optimizer

from ..plant.base import BasePlant
from ..plant.several import SeveralPlants
from ..structure.analyse import tensors_in
from ..structure.groups import Structure
from ..structure.record import ExampleInputs
from ..structure.verify import without
from .base import Granularity
from .entries import with_entries
from .states import STATE, States, is_states, with_states
from .weights import Weights

__all__ = ["Several"]

Names = Mapping[str, Granularity]


class Several(Granularity):
    """granularity={…}. `given`: module or its name -> what its parameters' units are."""

    def __init__(self, given: Mapping[nn.Module | str, Granularity]) -> None:
        self.given = dict(given)
        kinds = {str(kind): kind for kind in self.given.values()}
        self.states = [kind for kind in kinds.values() if isinstance(kind, States)]
        self.whole = [kind for kind in kinds.values() if kind.shrinks and kind not in self.states]
        self.entries = [kind for kind in kinds.values() if isinstance(kind, Weights)]
        if len(self.whole) > 1:
            raise ValueError(
                f"granularity: {self.whole[0]} and {self.whole[1]} would both cut whole tensors; give "
                '"channel+layer" in place of one, or one of them'
            )
        self.shrinks = bool(self.whole or self.states)
        self.returns = not self.states

    def __str__(self) -> str:
        named = (
            f"{type(key).__name__ if isinstance(key, nn.Module) else key!r}: {kind}"
            for key, kind in self.given.items()
        )
        return "{" + ", ".join(named) + "}"

    def trace(
        self, model: nn.Module, example_inputs: ExampleInputs, ignored_layers: Sequence[nn.Module | str] = ()
    ) -> Structure:
        owners = _owners(model, self._named(model))  # an error before anything runs
        kind = self.whole[0] if self.whole else Weights()
        traced = kind.trace(model, example_inputs, ignored_layers)
        for kind in self.states:
            ignored = tensors_in(model, ignored_layers)
            traced = with_states(traced, model, example_inputs, ignored, _foreign(owners, kind))
        return traced

    def units(self, model: nn.Module, traced: Structure, ignored: Collection[str] = ()) -> Structure:
        named = self._named(model)
        owners = _owners(model, named)
        structure = without(traced, {n: "" for n, g in enumerate(traced.groups) if g.kind != STATE})
        structure = replace(structure, refused=tuple(r for r in traced.refused if is_states(r.name)))
        for kind in self.whole:
            structure = _apart(kind.units(model, traced, ignored), owners, kind)
        for kind in self.entries:
            foreign = _foreign(owners, kind)
            groups, refused = kind.groups(model, traced, (*ignored, *foreign))
            own = [r for r in refused if r.name not in foreign]
            structure = with_entries(structure, groups, own)
        _require_used(structure, named, owners)
        return structure

    def plant(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        structure: Structure,
        park_on: torch.device | None = None,
    ) -> BasePlant:
        owners = _owners(model, self._named(model))
        states = {n: "" for n, g in enumerate(structure.groups) if g.kind == STATE}
        others = without(structure, states)
        whole = tuple(g for g in others.groups if g.name not in structure.entries)
        parts = [
            kind.plant(model, optimizer, replace(others, groups=whole, entries={}), park_on)
            for kind in self.whole
        ]
        for kind in self.states:
            mine = tuple(structure.groups[n] for n in states)
            parts.append(kind.plant(model, optimizer, replace(structure, groups=mine), park_on))
        for kind in self.entries:
            mine = tuple(
                g
                for g in structure.groups
                if g.name in structure.entries and str(owners[g.name]) == str(kind)
            )
            parts.append(kind.plant(model, optimizer, replace(structure, groups=mine), park_on))
        return SeveralPlants(model, optimizer, structure, parts, park_on)

    def _named(self, model: nn.Module) -> Names:
        """By the modules' names; ValueError if one is none of the model, or named twice."""
        names = {module: name for name, module in model.named_modules()}
        found: dict[str, Granularity] = {}
        for key, kind in self.given.items():
            if isinstance(key, nn.Module) and key not in names:
                raise ValueError(f"granularity: {type(key).__name__} is not a module of the model")
            if isinstance(key, str) and key not in names.values():
                raise ValueError(f"granularity: the model has no module called {key!r}")
            name = names[key] if isinstance(key, nn.Module) else key
            if name in found and str(found[name]) != str(kind):
                raise ValueError(
                    f"granularity: {name!r} is to be {found[name]} and {kind}; a module has one granularity"
                )
            found[name] = kind
        return found


def _owners(model: nn.Module, named: Names) -> dict[str, Granularity | None]:
    """Parameter or buffer -> whose it is: that of the innermost module which is named."""

    def owner(tensor: str) -> Granularity | None:
        path = tensor.split(".")[:-1]
        inner = (".".join(path[:depth]) for depth in range(len(path), -1, -1))
        return next((named[name] for name in inner if name in named), None)

    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: owner(name) for name, _ in tensors}


def _foreign(owners: Mapping[str, Granularity | None], kind: Granularity) -> list[str]:
    return [name for name, owner in owners.items() if str(owner) != str(kind)]


def _apart(structure: Structure, owners: Mapping[str, Granularity | None], kind: Granularity) -> Structure:
    """Without the groups that stand in another's parameters."""
    reasons: dict[int, str] = {}
    for number, group in enumerate(structure.groups):
        if group.kind == STATE:
            continue
        others = [s.tensor for s in group.slices if str(owners[s.tensor]) != str(kind)]
        if others:
            owner = owners[others[0]]
            reasons[number] = f"it stands in {others[0]}, which is {owner or 'nobody’s: not named'}"
    left = without(structure, reasons)
    new = {old: n for n, old in enumerate(n for n in range(len(structure.groups)) if n not in reasons)}
    branches = tuple(replace(b, group=new[b.group]) for b in structure.branches if b.group in new)
    return replace(left, branches=branches)


def _require_used(structure: Structure, named: Names, owners: Mapping[str, Granularity | None]) -> None:
    """ValueError if a module that was named has no unit at all."""
    used = {s.tensor for g in structure.groups for s in g.slices} | structure.entries.keys()
    for name, kind in named.items():
        prefix = f"{name}." if name else ""
        own = {t for t in owners if t.startswith(prefix) and str(owners[t]) == str(kind)}
        if not own & used:
            reasons = [r for r in structure.refused if r.name.startswith(name)]
            told = "".join(f"\n  {r.name} ({r.size}): {r.reason}" for r in reasons)
            raise ValueError(
                f"granularity: {name!r} has no unit that is {kind}{':' + told if told else ''}; every "
                "parameter has one owner, and a group of channels needs all that it stands in"
            )
