"""What a traced model uses, as polynomials in the widths: what a resource of the user's own is made of.

    cp.Resource("int8", "B", cost=lambda uses: uses.params)                    one byte a weight
    cp.Resource("dollars", "$", cost=lambda uses: 2e-18 * uses.flops)          at a price per FLOP

Polynomials add (`+`) and scale (`number *`); a use is what they give at the live widths, in the resource's
unit.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..budget import Budget, Price, Resource
from ..structure.groups import Structure
from .flops import flops
from .params import parameters
from .polynomial import Polynomial

__all__ = ["Uses", "own_costs"]


@dataclass(frozen=True)
class Uses:
    """Of one forward pass on the example inputs, and of the parameters."""

    structure: Structure

    @property
    def flops(self) -> Polynomial:
        return flops(self.structure)

    @property
    def params(self) -> Polynomial:
        return parameters(self.structure)

    @property
    def names(self) -> list[str]:
        """The parameters and buffers, by their names in the model."""
        return sorted(self.structure.tensors)

    def elements(self, name: str) -> Polynomial:
        """Of one parameter or buffer."""
        if name not in self.structure.tensors:
            raise ValueError(f"elements({name!r}): the model has no such tensor; see `names`")
        entries = self.structure.entries
        extents = (entries[name],) if name in entries else self.structure.tensors[name]
        return Polynomial.of([(1.0, extents)], len(self.structure.groups))


def own_costs(budget: Budget | Price, structure: Structure) -> dict[str, Polynomial]:
    """C_k(n) of the resources of the user's own."""
    return {resource.name: _cost(resource, structure) for resource in budget.own}


def _cost(resource: Resource, structure: Structure) -> Polynomial:
    cost = resource.cost(Uses(structure))
    if not isinstance(cost, Polynomial):
        raise TypeError(
            f"Resource({resource.name!r}).cost gave {type(cost).__name__}: add and scale what it is given, "
            "such as 1.0 * uses.params"
        )
    if not cost.value(structure.sizes) > 0.0:
        raise ValueError(f"Resource({resource.name!r}).cost: the dense model uses nothing of it")
    return cost
