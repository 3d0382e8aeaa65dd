"""Which joint masks the numeric check tries, so that what only happens to agree is seen.

odd       every group at a random odd width: equal widths would hide sizes that are tied together, even
          widths a kernel that insists on multiples
meeting   every group that is wider than w goes to w, for the sizes w that are commonest in the model: code
          may compare widths (`if y.shape == x.shape: y = y + x`), and does so differently where two that
          differ when dense are made to meet. Narrower groups stay on: one whose code fixes its size may
          pass only because another is at a special width (`if groups > 1`)
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from .extents import size
from .groups import Structure

__all__ = ["draws", "rounded"]


def draws(structure: Structure, seed: int, meetings: int) -> list[list[Tensor]]:
    """One odd draw, and meeting ones at so many sizes; per draw, one mask for each group, True = active."""
    generator = torch.Generator().manual_seed(seed)
    units = structure.sizes
    found = [[_random(n, _odd(n, generator), generator) for n in units]]
    for width in _common(structure)[:meetings]:
        found.append([_random(n, min(n, width), generator) for n in units])
    return found


def rounded(mask: Tensor, multiple: int) -> Tensor:
    """The mask with units switched on (or off) until their number is a multiple; all of them if all were."""
    live = int(mask.sum())
    if multiple == 1 or live == len(mask):
        return mask
    target = min(-(-live // multiple), len(mask) // multiple - 1) * multiple
    mask = mask.clone()
    mask[(~mask).nonzero().flatten()[: max(target - live, 0)]] = True
    mask[mask.nonzero().flatten()[target:]] = False
    return mask


def _odd(units: int, generator: torch.Generator) -> int:
    live = int(torch.randint(1, max(units, 2), (), generator=generator))
    return live - 1 + live % 2


def _common(structure: Structure) -> list[int]:
    """Lengths of the model's dimensions to which some group can shrink, the commonest first; 1 is odd's."""
    lengths = Counter(size(extent) for dims in structure.tensors.values() for extent in dims)
    widest = max(structure.sizes, default=0)
    return [length for length, _ in lengths.most_common() if 1 < length < widest]


def _random(units: int, live: int, generator: torch.Generator) -> Tensor:
    mask = torch.zeros(units, dtype=torch.bool)
    mask[torch.randperm(units, generator=generator)[:live]] = True
    return mask
