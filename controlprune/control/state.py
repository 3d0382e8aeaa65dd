"""States of regulators as plain containers, and back: for checkpoints.

A state is a frozen dataclass of numbers, None, tuples, arrays and further states. Arrays become tensors,
which `torch.save(weights_only=True)` and `torch.distributed.checkpoint` carry; the way back follows a
prototype, a state of the same kind.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import numpy as np
import torch

__all__ = ["pack", "unpack"]

S = TypeVar("S")


def pack(state: Any) -> Any:
    """Dataclasses as dicts, arrays as tensors (copies), anything else as it is."""
    if is_dataclass(state):
        return {field.name: pack(getattr(state, field.name)) for field in fields(state)}
    if isinstance(state, np.ndarray):
        return torch.from_numpy(state.copy())
    return state


def unpack(prototype: S, saved: Any) -> S:
    """A state like `prototype` from what `pack` made; LookupError, TypeError or ValueError if it is not."""
    if is_dataclass(prototype) and not isinstance(prototype, type):
        names = [field.name for field in fields(prototype)]
        if not isinstance(saved, dict) or set(saved) != set(names):
            raise ValueError(f"{type(prototype).__name__}: the saved state has other entries than {names}")
        return type(prototype)(**{name: unpack(getattr(prototype, name), saved[name]) for name in names})
    if isinstance(prototype, np.ndarray):
        array = saved.numpy().copy()
        if array.shape != prototype.shape:
            raise ValueError(f"an array of shape {array.shape} where {prototype.shape} belongs")
        return array
    if prototype is None and not (saved is None or type(saved) in (int, float)):
        raise ValueError(f"{saved!r} where None or a number belongs")
    value: Any = tuple(saved or ()) if isinstance(prototype, tuple) else saved
    return value
