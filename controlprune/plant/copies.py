"""The plant's tensors as `finalize` would leave them, as copies. The live ones are not touched."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .layout import at, cuts_of, select
from .plant import Plant

__all__ = ["compact_copies", "small_copy"]

Tensors = dict[str, Tensor]


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
