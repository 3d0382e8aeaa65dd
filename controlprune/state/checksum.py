"""A checksum of nested plain values and tensors: the same for equal content, whoever holds it.

SHA-256 of a prefix-free encoding: kind and length before every part, a tensor's bytes after its dtype and
shape, a number as Python writes it (which is exact; numpy's like Python's own). Lists and tuples count alike,
the order of a mapping does not count, nor whether a key is 0 or "0", nor the device: what a file format may
change on the way. About 1 GB/s on a CPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["checksum"]


def checksum(value: Any) -> str:
    state = hashlib.sha256()
    _feed(state, value)
    return state.hexdigest()


def _feed(state: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        flat = value.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format)
        _put(state, f"tensor {value.dtype} {tuple(value.shape)}")
        state.update(flat.view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        _put(state, f"mapping {len(value)}")
        for key in sorted(value, key=str):
            _put(state, str(key))
            _feed(state, value[key])
    elif isinstance(value, (list, tuple)):
        _put(state, f"sequence {len(value)}")
        for item in value:
            _feed(state, item)
    else:
        value = value.item() if isinstance(value, np.generic) else value
        _put(state, f"{type(value).__name__} {value!r}")


def _put(state: Any, text: str) -> None:
    encoded = text.encode()
    state.update(f"{len(encoded)} ".encode() + encoded)
