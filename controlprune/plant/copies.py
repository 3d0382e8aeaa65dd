"""Copies of the plant, which stays as it is: small, as `finalize` leaves it, or dense, as `detach` does."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..structure.caches import drop_caches
from ..structure.sizes import set_sizes
from ..structure.skipping import off, remove
from ..structure.standins import count_live
from .base import BasePlant, named_tensors
from .layout import at, cuts_of, select, set_data, whole
from .plant import Plant

__all__ = ["compact_copies", "dense_copies", "dense_copy", "fill_in", "small_copy"]

Tensors = dict[str, Tensor]


def compact_copies(plant: BasePlant) -> Tensors:
    """Every parameter and buffer, once, at the live widths; contiguous, detached copies."""
    names = set(plant.structure.tensors)
    spots = {spot.name: spot for spot in plant.spots}
    found: Tensors = {}
    with torch.no_grad():
        for name, tensor in (plant.tensors() | dict(plant.removed)).items():
            if name not in names:
                continue
            live = tensor.detach()
            if name in spots and not plant.compact:
                cuts = cuts_of(spots[name], plant.masks, tensor.device, {})
                live = select(live, at(cuts, "live"))
            found[name] = live.contiguous().clone()
    return found


def small_copy(plant: BasePlant) -> nn.Module:
    """A plain model with the live entries only: what `finalize` would give now."""
    other = copy.deepcopy(plant.model)
    if plant.shrinks and not plant.compact:
        cut = Plant(other, None, plant.structure)
        cut.apply(plant.masks, compact=True)
        cut.harden()
    elif plant.compact:
        remove(other, off(plant.structure.branches, plant.masks))
    return other


def dense_copies(plant: BasePlant, model: nn.Module | None = None) -> Tensors:
    """Every parameter and buffer, once, at its dense shape: live entries as they are, dormant as parked.

    `model`: another one laid out as the plant's, whose live entries are taken.
    """
    names = set(plant.structure.tensors)
    tensors = plant.tensors() if model is None else named_tensors(model)
    found = {name: x.detach().clone() for name, x in tensors.items() if name in names}
    with torch.no_grad():
        for spot in plant.spots:
            if spot.home is not None:
                home = spot.home.to(found[spot.name], copy=True)
                kept = "dormant" if spot.is_parameter else "silent"
                found[spot.name] = whole(found[spot.name], home, spot.cuts, plant.compact, kept)
    return found


def dense_copy(plant: BasePlant) -> nn.Module:
    """A plain dense model with all learned weights: what `detach` would give now."""
    other = copy.deepcopy(plant.model)
    fill_in(plant, other)
    return other


def fill_in(plant: BasePlant, model: nn.Module) -> None:
    """A copy, laid out as the plant's model, becomes dense: what it lacks comes from what is parked."""
    tensors = named_tensors(model)
    for name, dense in dense_copies(plant, model).items():
        set_data(tensors[name], dense)
    set_sizes(model, plant.structure, None)
    count_live(model, plant.structure, None)
    drop_caches(model)
