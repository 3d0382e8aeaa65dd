"""Single weights: a unit is an entry of a parameter (granularity/entries.py), its mask in place.

A unit's norm is w², its gate w ∂w, and it returns at zero (plant/entries.py). What is finalized is the model
with zeros in it: fewer FLOPs and params as they are counted, no less time on a CPU or GPU.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from ..plant.entries import EntryPlant
from ..structure.groups import Group, Refusal, Structure
from .base import Granularity
from .entries import STEPS, eligible, fixed, with_entries

__all__ = ["Weights", "require_found"]


class Weights(Granularity):
    """granularity="weight"."""

    shrinks = False

    def __str__(self) -> str:
        return '"weight"'

    def units(self, model: nn.Module, traced: Structure, ignored: Collection[str] = ()) -> Structure:
        groups, refused = self.groups(model, traced, ignored)
        require_found(self, groups, refused)
        return with_entries(fixed(traced), groups, refused)

    def groups(
        self, model: nn.Module, traced: Structure, ignored: Collection[str]
    ) -> tuple[list[Group], tuple[Refusal, ...]]:
        """One for each parameter that has such units; the others, with the reason."""
        names, refused = eligible(model, traced, ignored)
        shapes = {name: p.shape for name, p in model.named_parameters()}
        reasons = {name: self.why_not(name, shapes[name], model, traced) for name in names}
        more = (Refusal(name, shapes[name].numel(), reason) for name, reason in reasons.items() if reason)
        return [self.group(n, shapes[n].numel()) for n in names if not reasons[n]], (*refused, *more)

    def why_not(self, name: str, shape: torch.Size, model: nn.Module, traced: Structure) -> str:
        """Why this parameter has no such units; "" if it has."""
        return ""

    def group(self, name: str, size: int) -> Group:
        """Of a parameter with so many entries."""
        return Group(name, size, "weight", (), step=max(1, size // STEPS))

    def plant(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        structure: Structure,
        park_on: torch.device | None = None,
    ) -> EntryPlant:
        self.require_whole(model)
        return self.laid_on(model, optimizer, structure)

    def laid_on(self, model: nn.Module, optimizer: Optimizer | None, structure: Structure) -> EntryPlant:
        return EntryPlant(model, optimizer, structure)


def require_found(granularity: Granularity, groups: Sequence[Group], refused: Sequence[Refusal]) -> None:
    """ValueError where nothing of the model has such units, with the reasons."""
    if not groups:
        reasons = "".join(f"\n  {r.name} ({r.size}): {r.reason}" for r in refused)
        raise ValueError(
            f"granularity={granularity}: no parameter of this model has units to prune:{reasons or ' none'}"
        )
