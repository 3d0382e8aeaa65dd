"""Channels, neurons, heads, experts: one index space with all its slices. The default.

Units are what the trace found (structure/); laid down masked or physically small (plant/).
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from torch.optim import Optimizer

from ..plant.base import is_sharded
from ..plant.plant import Plant
from ..structure import require_groups
from ..structure.groups import Structure
from .base import Granularity

__all__ = ["Channels"]


class Channels(Granularity):
    """granularity="channel"."""

    def __str__(self) -> str:
        return '"channel"'

    def units(self, model: nn.Module, traced: Structure, ignored: Collection[str] = ()) -> Structure:
        return require_groups(traced, type(model).__name__)

    def plant(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        structure: Structure,
        park_on: torch.device | None = None,
    ) -> Plant:
        if not is_sharded(model):
            return Plant(model, optimizer, structure, park_on=park_on)
        if optimizer is None:
            raise ValueError(
                "optimizer=None: sharded parameters need one; give the optimizer that steps them"
            )
        from ..plant.sharded import ShardedPlant  # it imports a good deal of torch

        return ShardedPlant(model, optimizer, structure)
