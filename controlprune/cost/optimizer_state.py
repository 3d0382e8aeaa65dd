"""What an optimizer keeps per parameter, in bytes, found out by asking it.

A parameter that has been stepped shows its state. For one that has not, a copy of the optimizer's settings
takes one step on a parameter of a few elements whose dimensions all differ, so that every state tensor
tells which dimensions it shares:

    bytes of a state tensor = element size × Π_{d shared} P_d

The settings decide (momentum, amsgrad, centered, foreach, …), whatever the class. The user's optimizer, its
hooks, schedulers and state are not involved. An optimizer whose step fails on such a copy is a ValueError.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..plant.joint import inside, members
from ..plant.optimizer import entry_dims, require_nothing_beside

__all__ = ["Kept", "kept_state", "require_carried"]

SHAPE = (2, 3, 5, 7, 11, 13, 17, 19)  # all differ
OWN = ("state", "param_groups", "step")  # `step` on the object itself: schedulers put a wrapper there


class Untold(ValueError):
    """What an optimizer keeps cannot be found out."""


@dataclass(frozen=True)
class Kept:
    """One state tensor of a parameter: its bytes are `element × Π` of the parameter's sizes along `dims`."""

    key: str
    element: int
    dims: tuple[int, ...]


def kept_state(optimizer: Optimizer) -> dict[Tensor, tuple[Kept, ...]]:
    """Parameter -> what is kept of it, for every trainable parameter of the optimizer."""
    found: dict[Tensor, tuple[Kept, ...]] = {}
    for member in members(optimizer):
        for parameter, kept in _kept_by(member).items():
            found[parameter] = (*found.get(parameter, ()), *kept)
    return found


def _kept_by(optimizer: Optimizer) -> dict[Tensor, tuple[Kept, ...]]:
    found: dict[Tensor, tuple[Kept, ...]] = {}
    probed: dict[tuple[Any, ...], tuple[Kept, ...]] = {}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in (p for p in group["params"] if p.requires_grad):
            if optimizer.state.get(parameter):
                found[parameter] = _kept(optimizer, optimizer.state[parameter], parameter)
                continue
            key = (number, parameter.ndim, parameter.dtype, parameter.device)
            if key not in probed:
                probed[key] = _probe(optimizer, group, parameter)
            found[parameter] = probed[key]
    return found


def require_carried(optimizer: Optimizer | None, parameters: Mapping[str, Tensor]) -> None:
    """Refuse, by name, state of the `parameters` that could not follow units, before the first step makes it.

    No verdict where a trial step could touch more than its own few elements, or cannot be made.
    """
    names = {id(p): name for name, p in parameters.items()}
    for member in members(optimizer):
        rest = {k: v for k, v in vars(member).items() if k not in OWN and not k.endswith("_hooks")}
        if inside(member) or not _is_plain(rest):
            continue
        for group in member.param_groups:
            new = [p for p in group["params"] if id(p) in names and not member.state.get(p)]
            kinds = {(p.ndim, p.dtype, p.device): p for p in reversed(new)}
            for parameter in kinds.values():
                with contextlib.suppress(Untold), torch.random.fork_rng(devices=[]):
                    _probe(member, group, parameter, f" of parameters such as {names[id(parameter)]!r}")


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple, dict)):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, (bool, int, float, str, FunctionType))


def _kept(
    optimizer: Optimizer, entries: Mapping[str, object], parameter: Tensor, whose: str = ""
) -> tuple[Kept, ...]:
    where = f"optimizer: {type(optimizer).__name__} state"
    found = {key: entry_dims(value, parameter, f"{where} {key!r}{whose}") for key, value in entries.items()}
    return tuple(
        Kept(key, value.element_size(), found[key])
        for key, value in entries.items()
        if isinstance(value, Tensor)
    )


def _probe(
    optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor, whose: str = ""
) -> tuple[Kept, ...]:
    """One step of a copy of the settings on a few elements."""
    device = "cpu" if parameter.device.type == "meta" else parameter.device
    few = torch.zeros(SHAPE[: parameter.ndim], dtype=parameter.dtype, device=device, requires_grad=True)
    few.grad = torch.full_like(few, 0.01)
    stand_in = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        if name.endswith("_hooks"):
            vars(stand_in)[name] = OrderedDict()
        elif name not in OWN:
            vars(stand_in)[name] = copy.copy(value) if isinstance(value, (dict, list, set)) else value
    stand_in.state = defaultdict(dict)
    stand_in.param_groups = [{**group, "params": [few]}]
    step: Any = type(optimizer).step
    try:
        (step.__wrapped__ if getattr(step, "hooked", False) else step)(stand_in)
    except Exception as error:
        raise Untold(
            f"optimizer: what {type(optimizer).__name__} keeps per parameter cannot be told before its first "
            f"step (a trial step raised {type(error).__name__}: {error}); take one step with it, then attach"
        ) from error
    if few.ndim > 1:  # fewer elements than these may be settings
        require_nothing_beside(stand_in)
    return _kept(optimizer, stand_in.state[few], few, whose)
