"""Other forms of the plant's tensors, as copies: dense, masked, compact. The live tensors are not touched.

full     the dense tensor with every entry its true value (live ones as they are now, parked ones from home)
masked   full with the reader columns of dormant units zero: computes what the live model computes
compact  only the live entries: what `finalize` would leave
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..structure.extents import keep, labels
from .gate_gradients import inner
from .layout import Spot, at, cuts_of, fill_zero_, put_, select
from .plant import Plant

__all__ = ["compact_copies", "dense_copies", "parked_columns", "per_unit_products", "small_copy"]

Tensors = dict[str, Tensor]


def dense_copies(plant: Plant) -> tuple[Tensors, Tensors]:
    """(full, masked) of every parameter and buffer, detached; shared where nothing is dormant."""
    full, masked = {}, {}
    spots = {spot.name: spot for spot in plant.spots}
    with torch.no_grad():
        for name, tensor in plant.tensors().items():
            full[name] = masked[name] = tensor.detach()
            spot = spots.get(name)
            if spot is not None and spot.home is not None:
                full[name] = _full(spot, tensor, plant.compact)
                masked[name] = fill_zero_(full[name].clone(), at(spot.cuts, "silent"))
    return full, masked


def compact_copies(plant: Plant) -> Tensors:
    """Every parameter and buffer, once, at the live widths; contiguous, detached copies."""
    names = set(plant.structure.tensors)
    spots = {spot.name: spot for spot in plant.spots}
    found: Tensors = {}
    with torch.no_grad():
        for name, tensor in plant.tensors().items():
            if name not in names:
                continue
            live = tensor.detach()
            if name in spots and not plant.compact:
                cuts = cuts_of(spots[name], plant.masks, tensor.device, {})
                live = select(live, at(cuts, "live"))
            found[name] = live.contiguous().clone()
    return found


def small_copy(plant: Plant) -> nn.Module:
    """A plain model with the live entries only: what `finalize` would give now."""
    other = copy.deepcopy(plant.model)
    if not plant.compact:
        cut = Plant(other, None, plant.structure)
        cut.apply(plant.masks, compact=True)
        cut.harden()
    return other


def parked_columns(plant: Plant, name: str, dim: int, index: Tensor, masks: list[Tensor]) -> Tensor:
    """Positions `index` of dimension `dim` as parked, where they are parked; silent still where they read
    what `masks` has off."""
    spot = next(s for s in plant.spots if s.name == name)
    assert spot.home is not None
    columns = spot.home.index_select(dim, index.to(spot.home.device))
    others = at(cuts_of(spot, masks, spot.home.device, {}), "silent")
    return fill_zero_(columns, {d: i for d, i in others.items() if d != dim})


def per_unit_products(plant: Plant, full: Tensors, gradients: Tensors) -> list[Tensor]:
    """Σ ⟨w, ∂w⟩ over the reader columns of each unit, for dense tensors: one float32 CPU vector per group."""
    found = [torch.zeros(g.size) for g in plant.structure.groups]
    for number, group in enumerate(plant.structure.groups):
        others = [torch.ones_like(m) if k == number else m for k, m in enumerate(plant.masks)]
        for part in group.readers:
            if part.tensor in gradients:
                along = inner(full[part.tensor], gradients[part.tensor], part.dim).float().cpu()
                unit = labels(part.extent, number)
                counted = (unit >= 0) & keep(part.extent, others)
                found[number].index_add_(0, unit[counted], along[counted])
    return found


def _full(spot: Spot, tensor: Tensor, compact: bool) -> Tensor:
    assert spot.home is not None
    full = spot.home.to(tensor.device, copy=True)
    live = at(spot.cuts, "live")
    return put_(full, live, tensor.detach() if compact else select(tensor.detach(), live))
