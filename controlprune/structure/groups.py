"""What a trace of a model yields: groups of units, the slices they stand in, the work they cost.

Everything here is frozen and framework-free: names and terms, no tensors of the model.

- A **slice** is one dimension of one named parameter or buffer, as an `Extent` over groups. Its role for
  a group says what switching a unit off does there: a `reader` is contracted with the unit's output
  (the next layer's columns; zeroing them removes the unit exactly, whatever the activation), a
  `producer` computes the unit or is applied to it unit by unit (rows, biases, norm entries). Of a fused
  projection of queries and keys only the rows of the keys read: it is a partial reader, and a producer.
- **Work** is one counted operator: `FLOPs = coefficient × Π size(factor)`, as torch's FlopCounterMode
  counts it (a multiply-add is 2).
- **Traffic** is what one operator writes: `bytes = coefficient × Π size(factor)`, the factors being the
  dimensions of its output and the coefficient the bytes of an element. Views write nothing.
- A **size attribute** is a Python integer the model's code reads (`num_heads`, `in_features`, `groups`),
  equal to the size of an extent; it must follow when the tensors shrink.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from torch import Tensor

from .extents import Extent
from .formula import Formula
from .guards import Guard, Place

__all__ = [
    "Branch",
    "Group",
    "LiveNorm",
    "LiveRouter",
    "Refusal",
    "Role",
    "SizeAttribute",
    "Slice",
    "Structure",
    "Work",
    "widths_of",
]

Role = Literal["reader", "producer"]


@dataclass(frozen=True)
class Slice:
    """Dimension `dim` of the parameter or buffer called `tensor`; of a `partial` reader, what reads of it."""

    tensor: str
    dim: int
    extent: Extent  # partial: fixed where it does not read
    role: Role
    partial: bool = False


@dataclass(frozen=True)
class Group:
    """Units that live in one index space; all slices go together."""

    name: str
    size: int
    kind: str  # "channel", "neuron", "head", "head member", "group", … : for people, no behaviour hangs on it
    slices: tuple[Slice, ...]
    multiple: int = 1  # live widths must be a multiple of it (a kernel of the model insists)
    step: int = 0  # between widths that are tried; 0: as the grid says (cost/grid.py)
    least: int = 0  # the narrowest; 0: as the grid says
    returns: bool = True  # may a unit that is off come back?
    optional: bool = False  # may every unit be off?
    met: bool = False  # are two activations multiplied and summed over it (as queries and keys are)?

    @property
    def readers(self) -> tuple[Slice, ...]:
        return tuple(s for s in self.slices if s.role == "reader")

    @property
    def producers(self) -> tuple[Slice, ...]:
        return tuple(s for s in self.slices if s.role == "producer")


@dataclass(frozen=True)
class Refusal:
    """An index space that is left alone, and why, in the user's terms."""

    name: str
    size: int
    reason: str
    tensors: tuple[str, ...] = field(default=(), compare=False)  # that stand in it


@dataclass(frozen=True)
class Work:
    """One operator: FLOPs or bytes of a forward on the example inputs = coefficient × Π size(factor)."""

    where: str  # dotted name of the module that ran it
    operator: str
    coefficient: float
    factors: tuple[Extent, ...]
    weights: tuple[str, ...] = ()  # the parameters that it contracts with


@dataclass(frozen=True)
class SizeAttribute:
    """`getattr(module, attribute)` (entry `index` where it is a tuple) equals the size of `extent`."""

    module: str
    attribute: str
    index: int | None
    extent: Extent


@dataclass(frozen=True)
class Branch:
    """What is not run while the one unit of a group is off (structure/branches.py)."""

    group: int
    ends: str  # the module whose answer is added to the stream
    passes: tuple[str, ...]  # those before it
    returns: Mapping[str, int]  # module -> of how many its output is a tuple; 0: a tensor
    stays: bool = False  # would the code around it notice that its modules are empty?


@dataclass(frozen=True)
class LiveNorm:
    """A norm module with units of groups among its channels: masked, its statistics are of the live ones."""

    module: str
    extent: Extent  # of its channels
    formula: Formula


@dataclass(frozen=True)
class LiveRouter:
    """A module that gives units logits W x by torch's linear: masked, those of units off are -inf."""

    module: str
    parameter: str  # W, by its name in the module
    extent: Extent  # of its rows


@dataclass(frozen=True)
class Structure:
    """The model as the rest of the package sees it.

    `tensors` gives, for every parameter and buffer (canonical names, shared ones once), one extent per
    dimension, Fixed where nothing is prunable; `work` the counted operators of one forward pass on the
    example inputs in eval mode; `traffic` what each operator of that pass writes, like terms added up;
    `activations` what each operator of a pass in training mode allocates, one entry per tensor, in order;
    `aliases` the extra names of shared tensors -> canonical name; `norms` the modules that count live units;
    `routers` those that choose among them; `entries` how many entries of a tensor there are, where units are
    entries of it (granularity/); `branches` what is skipped as a whole.
    """

    groups: tuple[Group, ...]
    refused: tuple[Refusal, ...]
    tensors: Mapping[str, tuple[Extent, ...]]
    parameters: frozenset[str]  # which of `tensors` are parameters (the others are buffers)
    attributes: tuple[SizeAttribute, ...]
    work: tuple[Work, ...]
    traffic: tuple[Work, ...] = ()
    activations: tuple[Work, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    norms: tuple[LiveNorm, ...] = ()
    routers: tuple[LiveRouter, ...] = ()
    entries: Mapping[str, Extent] = field(default_factory=dict)
    guards: tuple[Guard, ...] = ()  # what the model's code asks about widths
    asked: Mapping[Place, int] = field(default_factory=dict)  # where, and how often in a pass
    branches: tuple[Branch, ...] = ()
    views: tuple[str, ...] = ()  # modules that infer sizes of views while units are away (structure/views.py)
    forwards: int = 0  # of the model, that the traces and the check took
    verified: bool = True  # masked = shrunk was tried on the model (not possible on meta tensors)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Dense widths N_g."""
        return tuple(g.size for g in self.groups)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(g.name for g in self.groups)


def widths_of(masks: Iterable[Tensor]) -> tuple[int, ...]:
    """Live units per group."""
    return tuple(int(np.count_nonzero(mask.numpy())) for mask in masks)
