"""The structure of a model whose units are entries of its parameters: which parameters, and what one costs.

Of a parameter `w` with |w| entries that operators of F FLOPs in all contract with, n units of k entries on:

    params(n) = k n        FLOPs(n) = F · k n / |w|     two for each live weight and use of it

A parameter has such units if it trains, has two dimensions or more, and the forward contracts with it as it
is: not if it is computed from others (parametrizations), stands in several places (tied), or is only looked
up or added.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import nn

from ..structure.extents import Extent, Fixed, Product, Units, size
from ..structure.groups import Group, Refusal, Structure, Work
from ..structure.verify import without

__all__ = ["STEPS", "eligible", "fixed", "with_entries"]

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
        elif not parameter.numel():
            reason = "it is empty"
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


def with_entries(base: Structure, groups: Sequence[Group], refused: Sequence[Refusal]) -> Structure:
    """`base` with these groups more; each is called as the parameter whose entries its units are.

    In none of those may a group of `base` stand. A unit is as many entries as there are for each.
    """
    units = {group.name: Units(g, group.size) for g, group in enumerate(groups, len(base.groups))}
    each = {name: math.prod(map(size, base.tensors[name])) // own.length for name, own in units.items()}
    return replace(
        base,
        groups=(*base.groups, *groups),
        refused=(*base.refused, *refused),
        work=tuple(term for work in base.work for term in _terms(work, units)),
        entries={**base.entries, **{name: _each(own, each[name]) for name, own in units.items()}},
    )


def _each(units: Units, entries: int) -> Extent:
    return units if entries == 1 else Product((units, Fixed(entries)))


def fixed(traced: Structure) -> Structure:
    """The model with no group at all."""
    alone = without(traced, dict.fromkeys(range(len(traced.groups)), ""))
    return replace(alone, refused=())


def _terms(work: Work, units: Mapping[str, Units]) -> list[Work]:
    """An operator's FLOPs, shared by the weights that it contracts with."""
    if not any(name in units for name in work.weights):
        return [work]
    whole, share = work.coefficient * math.prod(size(factor) for factor in work.factors), len(work.weights)
    return [
        replace(work, coefficient=whole / share / units[name].length, factors=(units[name],), weights=(name,))
        if name in units
        else replace(work, coefficient=whole / share, factors=(), weights=(name,))
        for name in work.weights
    ]
