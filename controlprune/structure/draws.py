"""Which joint masks the numeric check tries, so that what only happens to agree is seen.

odd       every group at a random odd width: equal widths would hide sizes that are tied together, even
          widths a kernel that insists on multiples
even      every group at a random even width: code may ask for the parity
ones      every group at one unit: dimensions of size 1 broadcast, and vanish in squeeze()
apart     a random half of the groups at one unit, the others even; and the reverse
least     every group at a sixteenth of its units, where a run stops by default
meeting   every group that is wider than w goes to w, for the sizes w that are commonest in the model: code
          may compare widths (`if y.shape == x.shape: y = y + x`), and does so differently where two that
          differ when dense are made to meet. Narrower groups stay on: one whose code fixes its size may
          pass only because another is at a special width (`if groups > 1`)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from .extents import size
from .groups import Structure

__all__ = ["at", "draws", "rounded"]


def draws(structure: Structure, seed: int, meetings: int) -> list[list[Tensor]]:
    """One draw of each kind, meeting ones at so many sizes: a mask for each group, True = active."""
    generator = torch.Generator().manual_seed(seed)
    units = structure.sizes
    odd = [_random(n, _odd(n, generator), generator) for n in units]
    found = [odd, [_random(n, _even(n, generator), generator) for n in units]]
    single = torch.randperm(len(units), generator=generator) % 2 == 0
    for alone in (torch.ones_like(single), single, ~single) if len(units) > 1 else (single,):
        widths = [1 if one else _even(n, generator) for one, n in zip(alone.tolist(), units, strict=True)]
        found.append([_random(n, width, generator) for n, width in zip(units, widths, strict=True)])
    found.append([_random(n, -(-n // 16), generator) for n in units])
    for width in _common(structure)[:meetings]:
        found.append([_random(n, min(n, width), generator) for n in units])
    return found


def at(structure: Structure, seed: int, widths: Mapping[int, int]) -> list[Tensor]:
    """A draw with these widths of some groups, and any of the others."""
    generator = torch.Generator().manual_seed(seed)
    return [
        _random(
            n, widths[g] if g in widths else int(torch.randint(1, n + 1, (), generator=generator)), generator
        )
        for g, n in enumerate(structure.sizes)
    ]


def rounded(mask: Tensor, multiple: int, least: int = 0) -> Tensor:
    """The mask with units switched on (or off) until their number is a multiple; all of them if all were.

    `least`: with units switched on until they are so many.
    """
    live = int(mask.sum())
    target = max(live, min(least, len(mask)))
    if multiple > 1 and target < len(mask):
        target = min(-(-target // multiple), len(mask) // multiple - 1) * multiple
    if target == live:
        return mask
    mask = mask.clone()
    mask[(~mask).nonzero().flatten()[: max(target - live, 0)]] = True
    mask[mask.nonzero().flatten()[target:]] = False
    return mask


def _odd(units: int, generator: torch.Generator) -> int:
    live = int(torch.randint(1, max(units, 2), (), generator=generator))
    return live - 1 + live % 2


def _even(units: int, generator: torch.Generator) -> int:
    """At least 2, less than all; all of 2."""
    return 2 * int(torch.randint(1, max((units + 1) // 2, 2), (), generator=generator))


def _common(structure: Structure) -> list[int]:
    """Lengths of the model's dimensions to which some group can shrink, the commonest first; 1 is ones'."""
    lengths = Counter(size(extent) for dims in structure.tensors.values() for extent in dims)
    widest = max(structure.sizes, default=0)
    return [length for length, _ in lengths.most_common() if 1 < length < widest]


def _random(units: int, live: int, generator: torch.Generator) -> Tensor:
    mask = torch.zeros(units, dtype=torch.bool)
    mask[torch.randperm(units, generator=generator)[:live]] = True
    return mask
