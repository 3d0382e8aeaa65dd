"""A layer's states, truncated between two steps of its training.

The layer gives its system, the system is balanced and cut, and the layer takes it back in its own
parameters, which stay the same objects with fewer entries; the optimizer stays valid and remembers what it
knew (`moments.py`). Layers whose A depends on the input have no
Hankel singular values and are cut by a rule: `selective.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..plant.layout import set_data
from .gramians import Array
from .layer import StateSpace, System, state_space_layers
from .moments import Map, Moments, carried
from .reduce import Spectrum, embedding, reduced, spectrum, states_for
from .selective import Selective, keep_states, scores_of

__all__ = ["Cut", "states_kept_by", "states_of", "to_truncate", "truncatable", "truncate", "values_of"]


@dataclass(frozen=True, eq=False)
class Cut:
    """What one truncation did to one layer."""

    layer: str
    before: int  # states
    after: int
    values: Array  # Hankel singular values before the cut, [systems, order]
    bound: float  # H∞ error of the layer's output, the largest over its systems; nan: none is known
    reset: tuple[str, ...]  # parameters whose optimizer state could not follow


def values_of(layer: nn.Module) -> Array:
    """Hankel singular values of a layer, [systems, order], falling; 2n of them where y = Re(C x).

    Of a `Selective` layer: its states' scores, falling.
    """
    if isinstance(layer, Selective):
        return scores_of(layer).sort(descending=True).values[None].double().cpu().numpy()
    return _spectrum(layer).values


def states_kept_by(layer: nn.Module, tolerance: float) -> int:
    """The fewest states that keep (1 − tolerance) of the sum of the layer's values."""
    if isinstance(layer, Selective):
        kept = values_of(layer)[0].cumsum()
        return int(np.searchsorted(kept, (1 - tolerance) * kept[-1] * (1 - 1e-9))) + 1
    return states_for(_spectrum(layer), tolerance)


def truncate(layer: nn.Module, states: int, optimizer: Optimizer | None = None, name: str = "") -> Cut:
    """Reduce `layer` to `states` states, in place; `optimizer` follows.

    Gradients of the last step are dropped.
    """
    if isinstance(layer, Selective):
        return _selected(layer, states, optimizer, name)
    cut, put = to_truncate(layer, states, optimizer, name)
    put()
    return cut


def to_truncate(
    layer: nn.Module, states: int, optimizer: Optimizer | None = None, name: str = ""
) -> tuple[Cut, Callable[[], None]]:
    """What `truncate` would do, and a call that does it; ValueError, with nothing changed, if it cannot."""
    found = _spectrum(layer)
    system = _system(layer)
    before = states_of(layer)
    _check_states(layer, states, name)
    small = reduced(found, states)
    new = _stacked(small, system, found.batched)
    parameters = dict(layer.named_parameters())
    taken = {n: t.detach() for n, t in _take(layer, new).items()}
    taken = {n: t.to(parameters[n].dtype).contiguous() for n, t in taken.items()}
    moments = Moments({}, ())
    if optimizer is not None:
        old = {n: parameters[n] for n in taken}
        moments = _moments(layer, optimizer, old, taken, small, found.batched)
    bound = max(one.bound for one in small)
    cut = Cut(name, before, states, found.values, bound, moments.dropped)
    return cut, lambda: _put(parameters, taken, optimizer, moments)


def states_of(layer: nn.Module) -> int:
    """How many states a layer has (per system)."""
    return layer.states if isinstance(layer, Selective) else _system(layer)[1].shape[-2]


def truncatable(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer of the model whose states can be cut, by its dotted name."""
    selective = {name: module for name, module in model.named_modules() if isinstance(module, Selective)}
    return dict(state_space_layers(model)) | selective


def _selected(layer: Selective, states: int, optimizer: Optimizer | None, name: str) -> Cut:
    """The states of the largest scores stay; nobody knows a bound."""
    before = layer.states
    _check_states(layer, states, name)
    values = values_of(layer)
    kept = scores_of(layer).topk(states).indices.sort().values
    keep_states(layer, kept, optimizer)
    return Cut(name, before, states, values, math.nan, ())


def _check_states(layer: nn.Module, states: int, name: str) -> None:
    now = states_of(layer)
    if not 1 <= states <= now:
        raise ValueError(f"states={states}: {name or type(layer).__name__} has {now}; give 1 to {now}")


def _spectrum(layer: nn.Module) -> Spectrum:
    if not isinstance(layer, StateSpace):
        raise ValueError(f"layer: {type(layer).__name__} does not give system() and parameters_for()")
    return spectrum(_system(layer), layer.real_output)


def _system(layer: nn.Module) -> System:
    with torch.no_grad():
        return cast(StateSpace, layer).system()


def _take(layer: nn.Module, system: System) -> Mapping[str, Tensor]:
    with torch.no_grad():
        return cast(StateSpace, layer).parameters_for(*system)


def _stacked(small: tuple, like: System, batched: bool) -> System:
    """The reductions as tensors of the layer's kind."""
    fields = ([one.poles for one in small], [one.B for one in small], [one.C for one in small])
    found = []
    for parts, model in zip(fields, like, strict=True):
        tensor = torch.stack([torch.as_tensor(part) for part in parts])
        tensor = tensor.to(model.device, torch.complex128 if model.is_complex() else torch.float64)
        found.append(tensor if batched else tensor[0])
    A, B, C = found
    return A, B, C


class _Giver(nn.Module):
    """`layer.system()` as a forward, so that torch.func can call it with other parameters."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> System:
        return cast(StateSpace, self.layer).system()


def _moments(
    layer: nn.Module,
    optimizer: Optimizer,
    old: dict[str, nn.Parameter],
    new: Mapping[str, Tensor],
    small: tuple,
    batched: bool,
) -> Moments:
    giver = _Giver(layer)

    def system(parameters: Mapping[str, Tensor]) -> System:
        named = {f"layer.{name}": tensor for name, tensor in parameters.items()}
        return torch.func.functional_call(giver, named, ())

    def wide(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.detach().double() for name, tensor in parameters.items()}

    large = system(wide(old))
    then = system(wide(new))

    def back(turned: bool) -> Map:
        lifted = embedding(large, then, small, batched, turned)
        return lambda q: cast(StateSpace, layer).parameters_for(*lifted(system(q)))

    return carried(optimizer, old, new, back(True), back(False))


def _put(
    parameters: Mapping[str, nn.Parameter],
    new: Mapping[str, Tensor],
    optimizer: Optimizer | None,
    moments: Moments,
) -> None:
    for name, tensor in new.items():
        parameter = parameters[name]
        parameter.grad = None
        set_data(parameter, tensor.clone())
        if optimizer is None or parameter not in optimizer.state:
            continue
        if name in moments.dropped:
            del optimizer.state[parameter]
        else:
            optimizer.state[parameter].update(moments.state[name])
