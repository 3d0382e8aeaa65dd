"""Masks: one CPU bool tensor of N_g per group, True = active; checked where they come in.

In files those of weights take a bit a unit: eight to a byte, the first in the lowest bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..structure.groups import Structure

__all__ = ["Masks", "all_on", "checked", "from_bits", "to_bits"]

Masks = tuple[Tensor, ...]


def all_on(structure: Structure) -> Masks:
    return tuple(torch.ones(group.size, dtype=torch.bool) for group in structure.groups)


def checked(masks: Sequence[Tensor], structure: Structure) -> Masks:
    """Own CPU copies of `masks`, or an error that names the group."""
    if len(masks) != len(structure.groups):
        raise ValueError(f"masks: got {len(masks)} for {len(structure.groups)} groups; give one for each")
    for mask, group in zip(masks, structure.groups, strict=True):
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"masks: {group.name!r} is {kind}; give a torch.bool tensor, True = active")
        if mask.shape != (group.size,):
            raise ValueError(f"masks: {group.name!r} has shape {tuple(mask.shape)}, not ({group.size},)")
        if not mask.any() and not group.optional:
            raise ValueError(f"masks: {group.name!r} has no active unit; leave at least one")
        if (live := int(mask.sum())) < group.least:
            raise ValueError(
                f"masks: {group.name!r} has {live} active units; the model's code takes "
                f"{group.least} at least"
            )
        if live % group.multiple and live < group.size:
            raise ValueError(
                f"masks: {group.name!r} has {live} active units; the model's code takes multiples of "
                f"{group.multiple}, or all {group.size}"
            )
    return tuple(mask.detach().to("cpu", copy=True) for mask in masks)


def to_bits(mask: Tensor) -> Tensor:
    """uint8 of ⌈N / 8⌉."""
    padded = torch.nn.functional.pad(mask.flatten().to("cpu", torch.uint8), (0, -mask.numel() % 8))
    return (padded.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def from_bits(bits: Tensor, units: int) -> Tensor:
    """The reverse; ValueError if it is not of so many units."""
    if bits.dtype != torch.uint8 or bits.shape != (-(-units // 8),):
        raise ValueError(f"masks: {tuple(bits.shape)} {bits.dtype} for {units} units")
    return (bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).bool().flatten()[:units]
