"""Room for other numbers of states, without a cut: more of them that are idle, or only the first ones.

    idle:  λ = 0, B = m^−½, C = 0        hears the input and is not heard: the output stays what it was

The states that are there keep their parameters to the bit, and with them what the optimizer remembers; of
idle ones it remembers nothing (zeros). The first ones alone are another system: what a checkpoint is loaded
into.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..plant.layout import set_data
from .layer import StateSpace, System

__all__ = ["first_states", "resize"]


def first_states(system: System, states: int) -> System:
    """The first `states` of a system, diagonal or dense, one or a batch."""
    A, B, C = system
    few = A[..., :states] if A.ndim < B.ndim else A[..., :states, :states]
    return few, B[..., :states, :], C[..., :states]


def resize(layer: nn.Module, states: int, optimizer: Optimizer | None = None) -> None:
    """`layer` with its first `states` states, or with idle ones added; the optimizer's state alike.

    ValueError, with nothing changed, if its parameters cannot hold an idle state.
    """
    space = cast(StateSpace, layer)
    with torch.no_grad():
        system = space.system()
        now = system[1].shape[-2]
        wanted = first_states(system, states) if states <= now else _with_idle(system, states - now)
        new = {name: tensor.detach() for name, tensor in space.parameters_for(*wanted).items()}
    parameters = {name: dict(layer.named_parameters())[name] for name in new}
    if wrong := [name for name, tensor in new.items() if not tensor.isfinite().all()]:
        raise ValueError(f"states={states}: {wrong[0]!r} of {type(layer).__name__} cannot hold an idle state")
    for name, tensor in new.items():
        parameter = parameters[name]
        entries = {} if optimizer is None else optimizer.state.get(parameter, {})
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim:
                entries[key] = _over(torch.zeros(tensor.shape).to(value), value)
        parameter.grad = None
        set_data(parameter, _over(tensor.to(parameter.dtype).clone(), parameter.detach()))


def _with_idle(system: System, more: int) -> System:
    A, B, C = system
    inputs = B.shape[-1]
    heard = B.new_full((*B.shape[:-2], more, inputs), inputs**-0.5)
    idle = A.new_zeros(*B.shape[:-2], more)
    if A.ndim < B.ndim:
        wide = torch.cat([A, idle], -1)
    else:
        wide = A.new_zeros(*A.shape[:-2], A.shape[-1] + more, A.shape[-1] + more)
        wide[..., : A.shape[-1], : A.shape[-1]] = A
    return wide, torch.cat([B, heard], -2), torch.cat([C, C.new_zeros(*C.shape[:-1], more)], -1)


def _over(tensor: Tensor, known: Tensor) -> Tensor:
    """`known` over the leading entries of `tensor`, as far as both go."""
    place = tuple(slice(min(pair)) for pair in zip(tensor.shape, known.shape, strict=True))
    tensor[place] = known[place]
    return tensor.contiguous()
