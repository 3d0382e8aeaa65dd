"""What a layer has to give so that its states can be valued and truncated.

    system()                      -> A, B, C     x⁺ = A x + B u,  y = C x or Re(C x)
    parameters_for(A, B, C)       -> its own parameters, by their names, that make this system

A: [n] (complex, diagonal), B: [n, m], C: [p, n]; or with a batch of independent systems that have one number
of states, A: [g, n], B: [g, n, m], C: [g, p, n] (S4D has one for every feature). Both are functions of
tensors that autograd can follow: the optimizer's moments are carried through their Jacobians. Sizes that the
layer keeps as integers it reads off the shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

__all__ = ["StateSpace", "System", "state_space_layers"]

System = tuple[Tensor, Tensor, Tensor]


@runtime_checkable
class StateSpace(Protocol):
    """A linear time-invariant layer: gives A, B, C, and takes A, B, C."""

    real_output: bool  # y = Re(C x) for real u, against y = C x

    def system(self) -> System: ...

    def parameters_for(self, A: Tensor, B: Tensor, C: Tensor) -> Mapping[str, Tensor]: ...


def state_space_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every layer of the model that follows the protocol, once, by its dotted name."""
    for name, module in model.named_modules():
        if _gives_and_takes(module):
            yield name, module


def _gives_and_takes(module: nn.Module) -> bool:
    return isinstance(module, StateSpace)
