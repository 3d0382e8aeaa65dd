"""States of state-space layers: a group per layer, a unit per state, ranked by Hankel singular values.

How they are cut and what is seen of them is in ssm/plant.py. What they cost is told by the model's own trace:

    every length in it that is L at N states and L − s at N − 1        ->  L − s N + s Units(layer)

(widths of tensors, of the operands of counted operators, of what is written and allocated). It is traced
twice for that, whatever the number of layers; the FLOPs are then what torch's FlopCounterMode counts of the
small layer: it knows products, not the scan's element-wise steps.

A layer follows the protocol of ssm/layer.py. Its parameters are its own: no channel is cut in them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import nn
from torch.optim import Optimizer

from ..ssm.layer import StateSpace, state_space_layers
from ..ssm.plant import StatePlant, group_name, layer_name, read_by
from ..ssm.resize import first_states
from ..ssm.truncate import states_of, values_of
from ..structure.analyse import analyse, tensors_in
from ..structure.exchange import at_widths, first_units
from ..structure.extents import Concat, Extent, Fixed, Product, Units, size
from ..structure.groups import Group, Refusal, Slice, Structure, Work
from ..structure.record import ExampleInputs
from ..structure.untouched import untouched
from .base import Granularity
from .entries import fixed

__all__ = ["STATE", "States", "is_states", "with_states"]

STATE = "state"  # what its groups are of
Lengths = Mapping[str, tuple[Extent, ...]]


class States(Granularity):
    """granularity="state"."""

    returns = False

    def __str__(self) -> str:
        return '"state"'

    def trace(
        self, model: nn.Module, example_inputs: ExampleInputs, ignored_layers: Sequence[nn.Module | str] = ()
    ) -> Structure:
        plain = fixed(analyse(model, example_inputs, ignored_layers=ignored_layers, check=False))
        return with_states(plain, model, example_inputs, tensors_in(model, ignored_layers))

    def units(self, model: nn.Module, traced: Structure, ignored: Collection[str] = ()) -> Structure:
        if not any(group.kind == STATE for group in traced.groups):
            reasons = "".join(f"\n  {r.name} ({r.size}): {r.reason}" for r in traced.refused)
            raise ValueError(
                f"granularity={self}: no layer of this model gives system() and takes parameters_for() "
                f"(controlprune.ssm), as far as example_inputs tell:{reasons or ' none'}"
            )
        return traced

    def plant(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        structure: Structure,
        park_on: torch.device | None = None,
    ) -> StatePlant:
        self.require_whole(model)
        return StatePlant(model, optimizer, structure)


def with_states(
    traced: Structure,
    model: nn.Module,
    inputs: ExampleInputs,
    ignored: Collection[str] = (),
    foreign: Collection[str] = (),
) -> Structure:
    """`traced`, and a group more for every state-space layer.

    `ignored`, `foreign`: parameters to be left alone, the second ones without a word.
    """
    groups, refused = list(traced.groups), list(traced.refused)
    tensors = dict(traced.tensors)
    for name, layer in state_space_layers(model):
        prefix = f"{name}." if name else ""
        if any(prefix + own in foreign for own, _ in layer.named_parameters()):
            continue
        lengths, reason = _lengths(prefix, layer, len(groups), traced, ignored)
        if reason:
            refused.append(Refusal(group_name(name), states_of(layer), reason))
        else:
            groups.append(_group(name, layer, lengths))
            tensors |= lengths
    found = replace(traced, groups=tuple(groups), refused=tuple(refused), tensors=tensors)
    return _costed(found, len(traced.groups), model, inputs)


def is_states(name: str) -> bool:
    """Is that what the group of a layer's states is called?"""
    return group_name(layer_name(name)) == name


def _lengths(
    prefix: str, layer: nn.Module, group: int, traced: Structure, ignored: Collection[str]
) -> tuple[Lengths, str]:
    """The extents of the layer's parameters over its states; or why it is left alone."""
    space = cast(StateSpace, layer)
    try:
        values_of(layer)
        with torch.no_grad():
            system = space.system()
            states = system[1].shape[-2]
            now = space.parameters_for(*system)
            less = space.parameters_for(*first_states(system, max(1, states - 1)))
    except (ValueError, RuntimeError) as error:
        return {}, f"its system cannot be read: {error}"
    own = dict(layer.named_parameters())
    shared = {prefix + key for key in now} & {*traced.aliases, *traced.aliases.values()}
    if states < 2:
        return {}, "it has one state"
    if wrong := [key for key in now if key not in own or own[key].shape != now[key].shape]:
        return {}, f"parameters_for gives {wrong[0]!r}, which is no parameter of that shape"
    if any(prefix + key in ignored for key in now):
        return {}, "in ignored_layers"
    if shared:
        return {}, f"{min(shared)!r} stands in several places of the model"
    if not all(own[key].requires_grad for key in now):
        return {}, "it is frozen"
    units = Units(group, states)
    return {
        prefix + key: tuple(
            _affine(*pair, units) for pair in zip(now[key].shape, less[key].shape, strict=True)
        )
        for key in now
    }, ""


def _group(name: str, layer: nn.Module, lengths: Lengths) -> Group:
    """Readers: what the gate on C x stands in."""
    reads = read_by(layer)
    slices = tuple(
        Slice(tensor, dim, extent, "reader" if tensor.rpartition(".")[2] in reads else "producer")
        for tensor, extents in lengths.items()
        for dim, extent in enumerate(extents)
        if not isinstance(extent, Fixed)
    )
    return Group(group_name(name), states_of(layer), STATE, slices, step=1, returns=False)


def _affine(now: int, less: int, units: Units) -> Extent:
    """now − s N + s n, s = now − less: the length at n of N units, if it is `less` at N − 1."""
    slope = now - less
    if not slope:
        return Fixed(now)
    grows = units if slope == 1 else Product((units, Fixed(slope)))
    rest = now - slope * units.length
    return Concat((Fixed(rest), grows)) if rest > 0 else grows


def _costed(structure: Structure, first: int, model: nn.Module, inputs: ExampleInputs) -> Structure:
    """With work, traffic and activations over the states too; their groups begin with number `first`."""
    groups = {layer_name(g.name): Units(k, g.size) for k, g in enumerate(structure.groups) if k >= first}
    if not groups:
        return structure
    widths = tuple(n - 1 if k >= first else n for k, n in enumerate(structure.sizes))
    with (
        untouched(model, inputs),
        at_widths(model, structure, first_units(model, structure, widths), widths),
    ):
        try:
            less = analyse(model, inputs, check=False)
        except ValueError as error:
            raise ValueError(
                f"model: with a state less in each of {', '.join(groups)} its forward fails ({error}); "
                "a layer whose states are cut reads their number off the shapes of its parameters"
            ) from error
    return replace(
        structure,
        work=_grown(structure.work, less.work, groups),
        traffic=_grown(structure.traffic, less.traffic, groups),
        activations=_grown(structure.activations, less.activations, groups),
        forwards=structure.forwards + less.forwards,
    )


def _grown(now: Sequence[Work], less: Sequence[Work], groups: Mapping[str, Units]) -> tuple[Work, ...]:
    """Every term with the states in it; the rest of a layer's, where the two passes differ, as one term."""
    if [(w.where, w.operator, len(w.factors)) for w in now] == [
        (w.where, w.operator, len(w.factors)) for w in less
    ]:
        return tuple(
            replace(a, factors=tuple(_grows(*pair, units) for pair in zip(a.factors, b.factors, strict=True)))
            if (units := _states_at(a.where, groups)) is not None and a.coefficient == b.coefficient
            else a
            for a, b in zip(now, less, strict=True)
        )
    found = [work for work in now if _states_at(work.where, groups) is None]
    for units in groups.values():
        mine = [[w for w in some if _states_at(w.where, groups) == units] for some in (now, less)]
        large, small = (sum(w.coefficient * _number(w) for w in some) for some in mine)
        slope = large - small
        for coefficient, factors in ((slope, (units,)), (large - slope * units.length, ())):
            if coefficient and mine[0]:
                found.append(Work(mine[0][0].where, mine[0][0].operator, coefficient, factors))
    return tuple(found)


def _states_at(where: str, groups: Mapping[str, Units]) -> Units | None:
    """Of the layer in which that is; of the only one, wherever it is."""
    if len(groups) == 1:
        return next(iter(groups.values()))
    inside = [name for name in groups if f"{where}.".startswith(f"{name}." if name else "")]
    return groups[max(inside, key=len)] if inside else None


def _grows(now: Extent, less: Extent, units: Units) -> Extent:
    if size(now) == size(less):
        return now
    if isinstance(now, Fixed):
        return _affine(size(now), size(less), units)
    for kind, terms in ((Product, "factors"), (Concat, "parts")):
        if isinstance(now, kind) and isinstance(less, kind):
            pairs = zip(getattr(now, terms), getattr(less, terms), strict=True)
            return kind(tuple(_grows(*pair, units) for pair in pairs))
    return now


def _number(work: Work) -> int:
    found = 1
    for factor in work.factors:
        found *= size(factor)
    return found
