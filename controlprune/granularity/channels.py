"""Channels, neurons, heads, experts: one index space with all its slices. The default.

Units are what the trace found (structure/); laid down masked or physically small (plant/).

    scores[h, t, s] = scale · Σ_d q[h, t, d] k[h, s, d]

"channel+head_dim": a d, in every head at once, is a unit too. Its readers are the rows that make k_d: with
them at zero the term is gone; compact, the column of queries is too (structure/tape/rows.py).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from ..plant.base import is_sharded
from ..plant.plant import Plant
from ..structure import require_groups
from ..structure.analyse import analyse
from ..structure.groups import Structure
from ..structure.record import ExampleInputs
from .base import Granularity

__all__ = ["Channels"]


class Channels(Granularity):
    """granularity="channel", or "channel+head_dim"."""

    def __init__(self, *, head_dim: bool = False) -> None:
        self.head_dim = head_dim

    def __str__(self) -> str:
        return '"channel+head_dim"' if self.head_dim else '"channel"'

    def trace(
        self, model: nn.Module, example_inputs: ExampleInputs, ignored_layers: Sequence[nn.Module | str] = ()
    ) -> Structure:
        return analyse(model, example_inputs, ignored_layers=ignored_layers, head_dim=self.head_dim)

    def units(self, model: nn.Module, traced: Structure, ignored: Collection[str] = ()) -> Structure:
        return require_groups(traced, type(model).__name__)

    def plant(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        structure: Structure,
        park_on: torch.device | None = None,
    ) -> Plant:
        if self.head_dim:
            self.require_whole(model)
        if not is_sharded(model):
            return Plant(model, optimizer, structure, park_on=park_on)
        if optimizer is None:
            raise ValueError(
                "optimizer=None: sharded parameters need one; give the optimizer that steps them"
            )
        from ..plant.sharded import ShardedPlant  # it imports a good deal of torch

        return ShardedPlant(model, optimizer, structure, park_on=park_on)
