"""What of an optimizer's state travels with a parameter when units leave and return.

An optimizer keeps tensors per parameter. With `P` the parameter's shape and `S` the state tensor's:

    same number of dimensions, every S_d ∈ {P_d, 1}   -> travels along the dimensions where S_d = P_d
                                                         (moments; Adafactor's factors too)
    one element                                       -> left alone (step counts)
    anything else                                     -> an error that names it: nobody knows its meaning

A dimension that is 1 in both is told by the other parameters of the optimizer: where the same state key
(of as many dimensions) is 1 against a longer parameter, it does not travel (`factored`).

So SGD, Adam(W), amsgrad, RMSprop, Adagrad, Adadelta, NAdam, RAdam, Rprop and any optimizer built like
them are carried exactly. Adafactor's factors travel, but its row and column means run over dormant
entries while masked (not while shrunk). LBFGS keeps flattened histories of all parameters: refused, as is
whatever else keeps tensors of a parameter's size beside `state`.

Several optimizers are seen as one (plant/joint.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .joint import key_of, members

__all__ = [
    "Factored",
    "check_optimizer",
    "entry_dims",
    "factored",
    "forget",
    "require_nothing_beside",
    "travelling",
    "travelling_dims",
]

Factored = frozenset[tuple[str, int, int]]  # (state key, its number of dimensions, a dimension it sums over)
ADAFACTOR = {"row_var": -1, "col_var": -2}  # torch's: which dimension each factor is a mean over


def check_optimizer(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> None:
    """Refuse, by name, an optimizer whose state could not follow the dense `parameters`.

    State that is smaller than its parameter may come from a compact checkpoint whose masks are about to
    be loaded: it passes here, and is refused by `travelling` if they are not.
    """
    for member in members(optimizer):
        if isinstance(member, torch.optim.LBFGS):
            raise ValueError(
                "optimizer: LBFGS keeps flattened histories over all parameters, which cannot follow units "
                "that leave and return; use a per-parameter optimizer such as SGD, Adam or AdamW"
            )
    for name, parameter in parameters.items():
        entries: Mapping[str, object] = optimizer.state.get(parameter, {})
        for key, value in entries.items():
            if not (isinstance(value, Tensor) and _fits_inside(value, parameter)):
                _travels(optimizer, parameter, name, key, value)


def factored(optimizer: Optimizer | None) -> Factored:
    """Which dimensions of which state are summed over: known, or told by the optimizer's parameters."""
    found: set[tuple[str, int, int]] = set()
    for number, member in enumerate(members(optimizer)):
        known = ADAFACTOR if isinstance(member, torch.optim.Adafactor) else {}
        found |= {
            (key_of(key, number), value.ndim, d)
            for parameter, entries in member.state.items()
            for key, value in entries.items()
            if isinstance(value, Tensor) and isinstance(parameter, Tensor)
            if value.ndim == parameter.ndim
            for d in range(value.ndim)
            if value.shape[d] == 1 < parameter.shape[d] or known.get(key) == d - value.ndim
        }
    return frozenset(found)


def forget(optimizer: Optimizer | None, gone: Collection[nn.Parameter]) -> None:
    """These are stepped no more; the groups stay, empty ones too: schedulers count them."""
    ids = {id(parameter) for parameter in gone}
    for member in members(optimizer) if ids else ():
        for group in member.param_groups:
            kept = [k for k, parameter in enumerate(group["params"]) if id(parameter) not in ids]
            for key in ("params", "param_names"):
                if key in group:
                    group[key][:] = [group[key][k] for k in kept]
        for parameter in gone:
            member.state.pop(parameter, None)


def travelling(
    optimizer: Optimizer | None, parameter: Tensor, name: str, summed: Factored
) -> dict[str, tuple[int, ...]]:
    """State key -> the dimensions it shares with `parameter`, for the tensors that share some."""
    found = {}
    for key, value in ({} if optimizer is None else optimizer.state.get(parameter, {})).items():
        assert optimizer is not None
        dims = _travels(optimizer, parameter, name, key, value)
        dims = tuple(d for d in dims if (key, parameter.ndim, d) not in summed)
        if dims:
            found[key] = dims
    return found


def travelling_dims(state: Tensor, parameter: Tensor, where: str) -> tuple[int, ...]:
    """Dimensions along which `state` follows `parameter`; an error that begins with `where` if unclear."""
    if state.ndim == parameter.ndim and all(
        s in (p, 1) for s, p in zip(state.shape, parameter.shape, strict=True)
    ):
        return tuple(d for d in range(state.ndim) if state.shape[d] == parameter.shape[d])
    if state.numel() == 1:
        return ()
    raise ValueError(
        f"{where} has shape {tuple(state.shape)}, which does not follow the parameter's "
        f"{tuple(parameter.shape)}; only state of the parameter's own shape (or 1 in some dimensions) "
        "can be carried: use another optimizer"
    )


def entry_dims(value: object, parameter: Tensor, where: str) -> tuple[int, ...]:
    """The same of anything an optimizer keeps: a number has none, a collection of tensors is refused."""
    if isinstance(value, Tensor):
        return travelling_dims(value, parameter, where)
    if next(_tensors(value), None) is not None:
        raise ValueError(f"{where} is a {type(value).__name__} of tensors; only plain tensors can be carried")
    if hasattr(value, "__array__"):
        raise ValueError(f"{where} is a {type(value).__name__}; only plain tensors can be carried")
    return ()


def _travels(optimizer: Optimizer, parameter: Tensor, name: str, key: str, value: object) -> tuple[int, ...]:
    where = f"optimizer: {type(optimizer).__name__} state {key!r} of parameter {name!r}"
    dims = entry_dims(value, parameter, where)
    if dims and isinstance(value, Tensor) and value.device != parameter.device:
        raise ValueError(f"{where} is on {value.device}, the parameter on {parameter.device}")
    return dims


def require_nothing_beside(optimizer: Optimizer | None) -> None:
    """Refuse, by name, an optimizer that keeps tensors of a parameter's size outside of `state`."""
    for member in members(optimizer):
        parameters = {id(p): p.numel() for group in member.param_groups for p in group["params"]}
        sizes = {*parameters.values(), sum(parameters.values())}
        places = {
            f"attribute {k!r}": v for k, v in vars(member).items() if k not in ("state", "param_groups")
        }
        for n, group in enumerate(member.param_groups):
            places |= {f"param_groups[{n}][{k!r}]": v for k, v in group.items() if k != "params"}
        for place, tensor in ((place, x) for place, value in places.items() for x in _tensors(value)):
            if id(tensor) not in parameters and tensor.numel() > 1 and tensor.numel() in sizes:
                raise ValueError(
                    f"optimizer: {type(member).__name__} keeps a tensor of shape {tuple(tensor.shape)} in "
                    f"its {place}, outside of `state`, which cannot follow units that leave and return; keep "
                    "it in state[parameter], or use another optimizer"
                )


def _tensors(value: object, depth: int = 3) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item, depth - 1)


def _fits_inside(state: Tensor, parameter: Tensor) -> bool:
    return state.ndim == parameter.ndim and all(
        s <= p for s, p in zip(state.shape, parameter.shape, strict=True)
    )
