"""The structure of a model whose units are entries of its parameters: which parameters, and what one costs.

Of a parameter `w` with |w| entries that operators of F FLOPs in all contract with, n of them on:

    params(n) = n          FLOPs(n) = F · n / |w|       two for each live weight and use of it

A parameter has such units if it trains, has two dimensions or more, and the forward contracts with it as it
is: not if it is computed from others (parametrizations), stands in several places (tied), or is only looked
up or added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from torch import nn

from ..structure.extents import Fixed, Product, Units, size
from ..structure.groups import Group, Refusal, Structure, Work

__all__ = ["eligible", "with_entries"]

STEPS = 1024  # widths of a group that are tried at first


def eligible(
    model: nn.Module, traced: Structure, ignored: Collection[str] = ()
) -> tuple[list[str], tuple[Refusal, ...]]:
    """The parameters whose entries can be units, and the others of two dimensions, with the reason."""
    contracted = {name for work in traced.work for name in work.weights}
    tied = set(traced.aliases.values())
    found, refused = [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        reason = ""
        if name in ignored:
            reason = "in ignored_layers"
        elif not parameter.requires_grad:
            reason = "it is frozen"
        elif name in tied:
            reason = "it is tied: it stands in several places of the model"
        elif ".parametrizations." in f".{name}":
            reason = "it is parametrised: the forward computes the weights from it"
        elif name not in contracted:
            reason = "no product is taken with it as it is"
        if reason:
            refused.append(Refusal(name, parameter.numel(), reason))
        else:
            found.append(name)
    return found, tuple(refused)


def with_entries(
    traced: Structure,
    groups: Sequence[Group],
    entries_per_unit: Callable[[str], int],
    refused: Sequence[Refusal],
) -> Structure:
    """`traced` with nothing but these groups; each is called as the parameter whose entries its units are."""
    units = {group.name: Units(g, group.size) for g, group in enumerate(groups)}
    numbers = {name: entries_per_unit(name) for name in units}
    return Structure(
        groups=tuple(groups),
        refused=tuple(refused),
        tensors={name: tuple(Fixed(size(e)) for e in extents) for name, extents in traced.tensors.items()},
        parameters=traced.parameters,
        attributes=(),
        work=tuple(term for work in traced.work for term in _terms(work, units)),
        aliases=traced.aliases,
        forwards=traced.forwards,
        verified=traced.verified,
        entries={name: _times(numbers[name], extent) for name, extent in units.items()},
    )


def _terms(work: Work, units: Mapping[str, Units]) -> list[Work]:
    """An operator's FLOPs, shared by the weights that it contracts with."""
    whole = work.coefficient * math.prod(size(factor) for factor in work.factors)
    share = len(work.weights)
    if not any(name in units for name in work.weights):
        return [replace(work, coefficient=whole, factors=())]
    return [
        replace(work, coefficient=whole / share / units[name].length, factors=(units[name],))
        if name in units
        else replace(work, coefficient=whole / share, factors=())
        for name in work.weights
    ]


def _times(number: int, extent: Units) -> Units | Product:
    return extent if number == 1 else Product((Fixed(number), extent))
