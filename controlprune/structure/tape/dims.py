"""Dimensions of tensors in the trace.

Every tensor seen has one `Dim` per dimension: its `Axis`, and the *sources* of the dimension, which are
the parameter dimensions it is a plain view of. Zero index i of a source and the tensor is zero there, so

    contraction over an axis with sources   ->  a *reader*: zeroing its columns removes the unit exactly
    contraction over an axis without        ->  two activations meet: the axis is pinned

A dimension may also be the *logits* that a linear layer gives to units (rules/routing.py). Softmax over them
is 0 for a unit whose logit is told to be -inf: its weight is a source too, (name, OFF), and with (name, ON)
all others are above 0. Of (name, ENDS), what stands at a unit that is off stands at the one before it. The
*labels* of a tensor are units that were picked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

from .axes import Axis

__all__ = ["ENDS", "OFF", "ON", "Dim", "Dims", "Source"]

OFF, ENDS, ON = -1, -2, -3
Source: TypeAlias = tuple[str, int]  # (parameter name, dimension), or (router's parameter, one of these)


@dataclass(frozen=True)
class Dim:
    """One dimension of a tensor in the trace."""

    axis: Axis
    sources: frozenset[Source] = frozenset()
    logits: str = ""  # the parameter that gives them, where units that are off may be -inf

    @property
    def size(self) -> int:
        return self.axis.size

    @property
    def plain(self) -> Dim:
        """The same index space, no longer a view of parameters."""
        return Dim(self.axis)

    @property
    def parameters(self) -> frozenset[Source]:
        """The sources that are dimensions of parameters."""
        return frozenset(source for source in self.sources if source[1] >= 0)

    @property
    def computed(self) -> Dim:
        """What is computed with it is zero where it is; of the rest nothing is known."""
        return replace(self, sources=frozenset(source for source in self.sources if source[1] >= OFF))

    @property
    def routers(self) -> frozenset[str]:
        """Those whose units that are off are 0 here."""
        return frozenset(name for name, dim in self.sources if dim == OFF)

    @property
    def picks(self) -> str:
        """The router by which what is off loses against what is on; "" if none does."""
        return self.logits or next(iter(sorted(name for name, dim in self.sources if dim == ON)), "")


Dims: TypeAlias = "list[Dim]"
