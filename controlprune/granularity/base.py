"""A granularity: one kind of unit.

    trace(model, inputs)      what is known of the model
    units(model, traced)      what a unit is, and what belongs to it: groups, and work that goes with them
    plant(model, …)           how masks of them are laid down, seen and finalized          (plant/base.py)
    shrinks                   is a masked net ever smaller than dense? If not, only what is counted can fall

What a mask costs follows from `units`: the extents of work and parameters are terms over the groups, in
whatever a group's width counts: channels, live weights, blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from ..plant.base import BasePlant, is_sharded
from ..structure.analyse import analyse
from ..structure.groups import Structure
from ..structure.record import ExampleInputs

__all__ = ["COUNTED", "Granularity"]

COUNTED = ("flops", "params")  # what falls with zeros alone


class Granularity(ABC):
    """Stateless: it makes what has state."""

    shrinks: bool = True
    returns: bool = True  # may units that are off come back?

    def trace(
        self, model: nn.Module, example_inputs: ExampleInputs, ignored_layers: Sequence[nn.Module | str] = ()
    ) -> Structure:
        """What `units` is given: the trace of the model, left as it was found."""
        return analyse(model, example_inputs, ignored_layers=ignored_layers, check=self.shrinks)

    @abstractmethod
    def units(self, model: nn.Module, traced: Structure, ignored: Collection[str] = ()) -> Structure:
        """The groups of units; `traced`: by channel (structure/analyse.py). ValueError if there are none.

        `ignored`: parameters to be left alone.
        """

    @abstractmethod
    def plant(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        structure: Structure,
        park_on: torch.device | None = None,
    ) -> BasePlant:
        """The masking layer, with every unit on."""

    def require(self, resources: Iterable[str], own: Iterable[str] = ()) -> None:
        """ValueError if one of these cannot fall; `own`: counted resources of the user's."""
        wrong = [name for name in resources if name not in (*COUNTED, *own)]
        if wrong and not self.shrinks:
            raise ValueError(
                f"budget: {', '.join(wrong)} does not fall with granularity={self!s}: its zeros stay in the "
                'tensors. Give flops or params, which count what is not zero, or granularity="channel"'
            )

    def require_whole(self, model: nn.Module) -> None:
        """ValueError if this process holds only a part of the parameters (FSDP2)."""
        if is_sharded(model):
            raise ValueError(
                f'granularity={self!s}: sharded parameters can be pruned by channel only; give "channel"'
            )
