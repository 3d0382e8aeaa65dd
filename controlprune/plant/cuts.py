"""Where a dimension is cut at given masks, and how such positions get to the device: in one copy.

Masks are on the host, and so is all that is worked out from them. What an accelerator needs of it goes there
together, in one copy for which the host does not wait, however many tensors there are (`cuts_at`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..structure.extents import Extent, groups_in, keep

__all__ = ["Cut", "CutKey", "Cuts", "Index", "Part", "along", "at", "cut", "cuts_at", "heard", "sent"]

Index = Mapping[int, Tensor]  # dimension -> int64 positions
Part = Literal["live", "dormant", "silent", "computing"]


@dataclass(frozen=True)
class Cut:
    """The positions of one dimension at given masks (int64, on the tensor's device)."""

    live: Tensor
    dormant: Tensor  # = silent ∪ computing
    silent: Tensor  # they read a dormant unit: zero in the masked layout
    computing: Tensor  # they compute a dormant unit: at work in the masked layout, unheard


Cuts = Mapping[int, Cut]  # dimension -> its positions, for dimensions with dormant ones
CutKey = tuple[Extent, Extent, frozenset[int], torch.device]


def at(cuts: Cuts, part: Part) -> dict[int, Tensor]:
    """The positions called `part`, for the dimensions that have some; where nothing is live, that too."""
    found = {dim: getattr(cut, part) for dim, cut in cuts.items()}
    return {dim: index for dim, index in found.items() if len(index) or part == "live"}


def along(cuts: Cuts, dims: Iterable[int]) -> dict[int, Cut]:
    return {dim: cuts[dim] for dim in dims if dim in cuts}


def heard(extent: Extent, reads: frozenset[int], masks: Sequence[Tensor]) -> Tensor:
    """Which positions do not read a dormant unit of the groups `reads`; `extent`: of those that read."""
    return keep(extent, {g: masks[g] if g in reads else torch.ones_like(masks[g]) for g in groups_in(extent)})


def cut(extent: Extent, reader: Extent, reads: frozenset[int], masks: Sequence[Tensor]) -> Cut | None:
    """On the host; None: nothing is dormant. `reader`: `extent`, fixed where positions do not read."""
    live = keep(extent, masks)
    if bool(live.all()):
        return None
    listens = heard(reader, reads, masks)
    return Cut(*(where.nonzero().flatten() for where in (live, ~live, ~listens, listens & ~live)))


def cuts_at(keys: Iterable[CutKey], masks: Sequence[Tensor]) -> dict[CutKey, Cut | None]:
    """The cuts of these dimensions, each worked out once, on their devices."""
    here: dict[tuple[Extent, Extent, frozenset[int]], Cut | None] = {}
    found: dict[CutKey, Cut | None] = {}
    for key in dict.fromkeys(keys):
        if key[:3] not in here:
            here[key[:3]] = cut(*key[:3], masks)
        found[key] = here[key[:3]]
    for device in {key[3] for key in found}:
        there = [key for key, one in found.items() if key[3] == device and one is not None]
        parts = [part for key in there for part in vars(found[key]).values()]
        indices = iter(sent(parts, device))
        found |= {key: Cut(*(next(indices) for _ in range(4))) for key in there}
    return found


def sent(vectors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Vectors of one number type, from the host to `device` in one copy; the host does not wait."""
    if device.type == "cpu" or not vectors:
        return list(vectors)
    whole = torch.cat(list(vectors))
    whole = whole.pin_memory() if device.type == "cuda" else whole
    return list(whole.to(device, non_blocking=True).split([len(vector) for vector in vectors]))
