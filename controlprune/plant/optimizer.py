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
entries while masked (not while shrunk). LBFGS keeps flattened histories of all parameters: refused.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Factored", "check_optimizer", "factored", "travelling", "travelling_dims"]

Factored = frozenset[tuple[str, int, int]]  # (state key, its number of dimensions, a dimension it sums over)
ADAFACTOR = {"row_var": -1, "col_var": -2}  # torch's: which dimension each factor is a mean over


def check_optimizer(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> None:
    """Refuse, by name, an optimizer whose state could not follow the dense `parameters`.

    State that is smaller than its parameter may come from a compact checkpoint whose masks are about to
    be loaded: it passes here, and is refused by `travelling` if they are not.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "optimizer: LBFGS keeps flattened histories over all parameters, which cannot follow units that "
            "leave and return; use a per-parameter optimizer such as SGD, Adam or AdamW"
        )
    for name, parameter in parameters.items():
        entries: Mapping[str, object] = optimizer.state.get(parameter, {})
        for key, value in entries.items():
            if not (isinstance(value, Tensor) and _fits_inside(value, parameter)):
                _travels(optimizer, parameter, name, key, value)


def factored(optimizer: Optimizer | None) -> Factored:
    """Which dimensions of which state are summed over: known, or told by the optimizer's parameters."""
    states = {} if optimizer is None else optimizer.state
    pairs = [
        (parameter, key, value)
        for parameter, entries in states.items()
        for key, value in entries.items()
        if isinstance(value, Tensor) and isinstance(parameter, Tensor) and value.ndim == parameter.ndim > 0
    ]
    known = ADAFACTOR if isinstance(optimizer, torch.optim.Adafactor) else {}
    return frozenset(
        (key, value.ndim, d)
        for parameter, key, value in pairs
        for d in range(value.ndim)
        if value.shape[d] == 1 < parameter.shape[d] or known.get(key) == d - value.ndim
    )


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


def _travels(optimizer: Optimizer, parameter: Tensor, name: str, key: str, value: object) -> tuple[int, ...]:
    where = f"optimizer: {type(optimizer).__name__} state {key!r} of parameter {name!r}"
    if isinstance(value, Tensor):
        dims = travelling_dims(value, parameter, where)
        if dims and value.device != parameter.device:
            raise ValueError(f"{where} is on {value.device}, the parameter on {parameter.device}")
        return dims
    if isinstance(value, (list, tuple, dict)) and _holds_tensor(value):
        raise ValueError(f"{where} is a {type(value).__name__} of tensors; only plain tensors can be carried")
    return ()


def _fits_inside(state: Tensor, parameter: Tensor) -> bool:
    return state.ndim == parameter.ndim and all(
        s <= p for s, p in zip(state.shape, parameter.shape, strict=True)
    )


def _holds_tensor(value: list | tuple | dict) -> bool:
    items = value.values() if isinstance(value, dict) else value
    return any(
        isinstance(item, Tensor) or (isinstance(item, (list, tuple, dict)) and _holds_tensor(item))
        for item in items
    )
