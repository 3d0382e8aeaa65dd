"""What the loop asks of a plant, whatever its units are: channels (plant.py), weights (entries.py), several.

    masks, compact                  which units are on, and are the others out of the tensors?
    project(masks)                  the masks nearest to these that can be laid down
    apply(masks, compact=…)         the one way to other masks
    expect(kind)                    what of the coming gradients is to be read
    gate_gradient(), weight_norms() what is seen of every unit
    release(), harden()             dense again with no hook, or as it is for good

All vectors have one entry per unit, the groups of `structure` one after the other.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..structure.groups import Structure, widths_of
from .gate_gradients import Later
from .layout import Spot
from .masks import Masks

__all__ = ["BasePlant", "Kind", "is_sharded", "named_tensors"]

Kind = Literal["gate", "return", "entry"]
"""Of a weight `w` of gradient ∂w, where it is on, and where it is off (zero) and s is the RMS of those on:

    gate     w ∂w        0            what its going does; at zero there is nothing to go
    return   w ∂w        s ∂w         of one that is off, as if it stood at s
    entry    ∂w          ∂w

A channel's columns are parked with their values: its gate gradient is what it is, whatever is asked.
"""


class BasePlant(ABC):
    """The user's model and optimizer with any of its units switched off."""

    shrinks: bool = True  # has it a compact layout?
    packs: ClassVar[bool] = False  # are masks in files a bit a unit?
    parks: ClassVar[bool] = True  # is what is off kept, so that it can come back?
    model: nn.Module
    optimizer: Optimizer | None
    structure: Structure
    park_on: torch.device | None = None
    removed: Mapping[str, Tensor] = MappingProxyType({})  # what `harden` took out of the model, all of it off
    masks: Masks
    compact: bool

    @property
    def group(self) -> Any:
        """The processes that hold a part of the model each; None: this one holds all of it."""
        return None

    @property
    def place(self) -> str:
        """Which of those processes this is; "" if there is one."""
        return ""

    @property
    def spots(self) -> tuple[Spot, ...]:
        """The tensors whose dimensions units stand in, with what is parked of them: to read."""
        return ()

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer under all its names, as they are now."""
        return named_tensors(self.model)

    def gathered(self, model: nn.Module) -> nn.Module:
        """`model`, plain and dense, with the weights of all parts, at the present masks, small."""
        raise ValueError("gathered: this process holds all of the model")

    def own(self, name: str, tensor: Tensor) -> Tensor:
        """The part of a whole tensor of that name that this process holds."""
        return tensor

    def project(self, masks: Masks) -> Masks:
        """The masks nearest to `masks` that can be laid down."""
        return masks

    def widths_at(self, masks: Sequence[Tensor], compact: bool) -> tuple[int, ...]:
        """Units in the tensors at these masks and that layout."""
        return widths_of(masks) if compact else self.structure.sizes

    @property
    def widths(self) -> tuple[int, ...]:
        """Units in the tensors."""
        return self.widths_at(self.masks, self.compact)

    def shares(self) -> Tensor | None:
        """Of units that are seen only as a whole: the amplitude of each in it, Σ² = 1 per group.

        1 where a unit is seen by itself; None: all are.
        """
        return None

    @property
    def error_bounds(self) -> Mapping[str, float]:
        """Of groups whose cuts have a bound: Σ over the cuts so far, by name."""
        return {}

    @property
    def mark(self) -> Sequence[int]:
        """Tells the tensors of this plant from others that have the same masks; ranks compare it."""
        return ()

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Inside, `apply` makes room for tensors that are about to be loaded."""
        yield

    def expect(self, kind: Kind | None) -> None:
        """Of the next backward passes, gradients of dormant units will be read so (None: not at all)."""
        return None

    @property
    def portable(self) -> tuple[Structure, Masks]:
        """What a file says of the model beside its tensors."""
        return self.structure, self.masks

    @abstractmethod
    def apply(self, masks: Sequence[Tensor], *, compact: bool) -> None:
        """Switch to `masks` in the masked or the compact layout, from any other."""

    @abstractmethod
    def quiet(self, state: Mapping[str, Any], prefix: str) -> bool:
        """Is nothing of dormant units in this dense state dict?"""

    @abstractmethod
    def follow_tensors(self) -> None:
        """What is kept of the masks goes where the user took the model: number type, device."""

    def recheck(self) -> None:
        """`Changed` (layout.py) unless the tensors are those that were left, or others of their shapes."""
        self.follow_tensors()

    @abstractmethod
    def rest(self) -> None:
        """What is dormant stands as it does between two steps, whatever was written since."""

    @property
    def rests(self) -> bool:
        """Is there anything that `rest` sees to?"""
        return True

    @abstractmethod
    def read_later(self, later: Later) -> None:
        """Gradients are averaged over replicas: `later` calls back when they are, in every backward pass."""

    @abstractmethod
    def release(self) -> None:
        """Back to dense; no hook is left, nothing is parked."""

    @abstractmethod
    def harden(self) -> None:
        """As it is for good: model and optimizer are plain ones."""

    @property
    @abstractmethod
    def has_gradients(self) -> bool:
        """Has anything that tells of a unit a gradient now?"""

    @property
    def observable(self) -> tuple[bool, ...]:
        """Per group: is all trained that tells of its units, so that ∂L/∂g is known?"""
        return (True,) * len(self.structure.groups)

    @abstractmethod
    def gate_gradient(self, only: Collection[int] | None = None) -> Tensor:
        """∂L/∂g of all units, float32, zero where one is absent; no synchronisation.

        `only`: what the parameters of these ids have to say.
        """

    @abstractmethod
    def weight_norms(self) -> list[Tensor]:
        """Σ w² of every unit (channels: over the columns that read it), float32 per group."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Masks, layout and what is parked, as plain tensors (for safetensors); not the live weights."""

    @abstractmethod
    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Go to the saved masks and layout, and park what was parked then."""


def is_sharded(model: nn.Module) -> bool:
    """Has it DTensor parameters (FSDP2, tensor parallelism)? plant/sharded.py"""
    tensor = sys.modules.get("torch.distributed.tensor")  # without it there are none
    return tensor is not None and any(isinstance(p, tensor.DTensor) for p in model.parameters())


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under all its names, as they are now."""
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        dot = f"{path}." if path else ""
        for own, found in ((module._parameters, parameters), (module._buffers, buffers)):
            for name, tensor in own.items():
                if tensor is not None:
                    found[dot + name] = tensor
    return parameters | buffers
