"""Switch a few units for one forward pass, in place, and switch them back exactly.

With positions `K(m)` of a reader dimension live under masks `m`, going from `m` to `m'` for a moment is

    off:  columns K(m) \\ K(m')  are zero,
    on:   columns K(m') \\ K(m)  hold their parked values (only where the plant is masked, not compact).

Used for paired ablations; nothing else of the model is touched, values are copied back bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..plant.copies import parked_columns
from ..plant.plant import Plant
from ..structure.extents import keep

__all__ = ["switched"]


@contextmanager
def switched(plant: Plant, group: int, units: Tensor, *, off: bool) -> Iterator[None]:
    """Units `units` (positions in the group) off, or on, inside the `with`."""
    masks = list(plant.masks)
    masks[group] = masks[group].clone()
    masks[group][units] = not off
    tensors = plant.tensors()
    undo: list[tuple[Tensor, int, Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for part in plant.structure.groups[group].readers:
                tensor = tensors[part.tensor]
                before, after = keep(part.extent, plant.masks), keep(part.extent, masks)
                changed = before & ~after if off else after & ~before
                index = torch.nonzero(changed).flatten()
                live = index
                if plant.compact:
                    live = (torch.cumsum(before, 0) - 1)[index]
                live = live.to(tensor.device)
                undo.append((tensor, part.dim, live, tensor.index_select(part.dim, live)))
                if off:
                    tensor.data.index_fill_(part.dim, live, 0)
                else:
                    columns = parked_columns(plant, part.tensor, part.dim, index, masks)
                    tensor.data.index_copy_(part.dim, live, columns.to(tensor.device))
        yield
    finally:
        with torch.no_grad():
            for tensor, dim, index, values in reversed(undo):
                tensor.data.index_copy_(dim, index, values)
