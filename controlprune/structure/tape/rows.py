"""Rows: which rows of parameters make an entry of an activation, so that it is zero where they are.

    y = x Wᵀ + b          y[…, m] = 0, whatever x is, where W[m] = 0 and b[m] = 0
    q·k = Σ_d q_d k_d     loses its d-th term where k_d = 0

Where two activations meet, no parameter stands between them. But if one is a linear map, only rearranged and
scaled since, rows that make its d-th entries *read* unit d: at zero, the unit is gone from the product. The
gate gradient is ⟨w, ∂w⟩ over them, as that activation is linear in them. This holds if nothing else is given
what they make: what is, is noted, and rows that are both read and heard elsewhere are refused.

An *alternative* is a set of origins, index tensors of the activation's shape: an entry is zero where the rows
of all of them are (−1: none there). A parameter has one for each of its dimensions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .axes import Axis
from .dims import Source

__all__ = ["Alternative", "Alternatives", "Event", "Origin", "Rows", "both"]

MOST = 16  # alternatives that are followed of one tensor


@dataclass(frozen=True)
class Origin:
    """Per entry of a tensor, the position along a parameter's dimension that makes it, or −1."""

    source: Source
    index: Tensor


Alternative: TypeAlias = tuple[Origin, ...]
Alternatives: TypeAlias = tuple[Alternative, ...]


@dataclass(frozen=True)
class Event:
    """`axis` is contracted between two activations; one is made by these positions of its sources."""

    axis: Axis
    where: Mapping[Source, Tensor]  # bool


class Rows:
    """What is known of the tensors of one trace, and which rows are read."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._made: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._heard: dict[Source, Tensor] = {}  # given to something that does not only rearrange or scale
        self._lengths: dict[Source, int] = {}
        self._reading: int | None = None  # the operand that is read in the present call

    # --- what is followed ------------------------------------------------------------------------

    def of(self, tensor: Tensor) -> Alternatives:
        found: Alternatives | None = self._made.get(tensor)
        return found or ()

    def own(self, name: str, parameter: Tensor) -> None:
        """A parameter of the model: zero along any of its dimensions."""
        found = []
        for d, length in enumerate(parameter.shape):
            self._lengths[name, d] = length
            shape = [length if k == d else 1 for k in range(parameter.dim())]
            index = torch.arange(length, dtype=torch.int32).view(shape).expand(parameter.shape)
            found.append((Origin((name, d), index),))
        self.set(parameter, tuple(found))

    def set(self, tensor: Tensor, alternatives: Alternatives) -> None:
        if alternatives:
            self._made[tensor] = alternatives[:MOST]
        else:
            self._made.pop(tensor, None)

    def forget(self, storage: int) -> None:
        """What lies in this memory was written."""
        for tensor in [t for t in self._made if t.untyped_storage()._cdata == storage]:
            self._made.pop(tensor)

    # --- what is heard ---------------------------------------------------------------------------

    def read(self, axis: Axis, operands: Sequence[tuple[Tensor, int]]) -> frozenset[Source]:
        """The sources that read `axis`, contracted over these dimensions of two activations; or none."""
        if len({id(tensor) for tensor, _ in operands}) < 2:
            return frozenset()
        found = [
            (id(tensor), self._where(alternative))
            for tensor, dim in reversed(operands)
            for alternative in self.of(tensor)
            if _tells(alternative, dim)
        ]
        if not found:
            return frozenset()
        self._reading, where = next((one for one in found if not self._hears(one[1])), found[0])
        self.events.append(Event(axis, where))
        return frozenset(where)

    def hear(self, tensors: Iterable[Tensor]) -> None:
        """These are given to something that is not followed, but for what is read in this call."""
        for tensor in tensors:
            for alternative in self.of(tensor) if id(tensor) != self._reading else ():
                for source, where in self._where(alternative).items():
                    self._heard[source] = self._heard.get(source, torch.zeros_like(where)) | where
        self._reading = None

    def _where(self, alternative: Alternative) -> dict[Source, Tensor]:
        """The positions of each source that are in it."""
        found: dict[Source, Tensor] = {}
        for source, index in ((origin.source, origin.index) for origin in alternative):
            where = found.setdefault(source, torch.zeros(self._lengths[source], dtype=torch.bool))
            where[index[index >= 0].long()] = True
        return found

    # --- what follows ----------------------------------------------------------------------------

    def shared(self) -> list[Axis]:
        """The axes whose rows are heard elsewhere too."""
        return [event.axis for event in self.events if self._hears(event.where)]

    def _hears(self, where: Mapping[Source, Tensor]) -> bool:
        """Was some of it given to something else?"""
        return any(bool((self._heard[s] & there).any()) for s, there in where.items() if s in self._heard)

    @property
    def where(self) -> dict[Source, Tensor]:
        """The positions that read, of every source."""
        found: dict[Source, Tensor] = {}
        for event in self.events:
            for source, where in event.where.items():
                found[source] = found.get(source, torch.zeros_like(where)) | where
        return found


def both(first: Alternatives, second: Alternatives) -> Alternatives:
    """Zero where one of the first and one of the second are."""
    pairs = itertools.islice(itertools.product(first, second), MOST)
    return tuple(one + other for one, other in pairs)


def _tells(alternative: Alternative, dim: int) -> bool:
    """Has every entry an origin, and not the same one all along `dim`?"""
    indices = [origin.index for origin in alternative]
    covered = torch.stack([index >= 0 for index in indices]).any(0)
    if indices[0].shape[dim] < 2 or not bool(covered.all()):
        return False
    ends = torch.stack([index.select(dim, 0) != index.select(dim, -1) for index in indices])
    return bool(ends.any(0).all())
