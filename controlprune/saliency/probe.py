"""The probe: what would the gates of absent units see?

A unit that is physically absent is not observed. A probe runs the last batch once more through the dense
masked form of the same weights (parked values in place, reader columns of dormant units zero): the
output is the same, so its recorded gradient G = ∂L/∂y still holds, and one backward pass of ⟨G, y⟩ gives

    ∂L/∂g_i = Σ ⟨parked column, its gradient⟩        for every dormant unit i.

It is a side pass over copies (`torch.func.functional_call`): no BatchNorm statistic, no random state and
no `.grad` is touched. It costs one dense forward and backward pass, and is counted as overhead.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

from ..plant.copies import dense_copies, per_unit_products
from ..plant.plant import Plant
from ..structure.groups import widths_of
from ..structure.sizes import set_sizes
from .last_batch import Batch, float_leaves, undisturbed

__all__ = ["probe"]


def probe(plant: Plant, batch: Batch) -> Tensor:
    """Gate gradients of all units, groups concatenated, float32; live units included."""
    full, masked = dense_copies(plant)
    readers = {part.tensor for group in plant.structure.groups for part in group.readers}
    leaves = {name: masked[name].detach().requires_grad_() for name in sorted(readers)}
    masked = masked | leaves
    widths = widths_of(plant.masks)
    try:
        if plant.compact:
            set_sizes(plant.model, plant.structure, plant.structure.sizes)
        with undisturbed(plant.model), torch.enable_grad():
            outputs = float_leaves(functional_call(plant.model, masked, batch.args, batch.kwargs))
            along = [
                (y * g.to(y.dtype)).sum()
                for y, g in zip(outputs, batch.gradients, strict=True)
                if g is not None and y.requires_grad
            ]
            total = torch.stack(along).sum()
            gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    finally:
        if plant.compact:
            set_sizes(plant.model, plant.structure, widths)
    found = {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}
    return torch.cat(per_unit_products(plant, full, found))
