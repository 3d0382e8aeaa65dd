"""What identifies a tensor: its names in the model, and the memory that it lies in."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["named_tensors", "storage_of", "view_key"]


def storage_of(tensor: Tensor) -> int:
    """Identifies the memory that a tensor lies in while it lives; 0 where it has none of its own."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else 0


def named_tensors(model: nn.Module) -> Iterable[tuple[str, Tensor, bool]]:
    """Every name of every tensor, and whether it is a parameter."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, parameter, True
    for name, buffer in model.named_buffers(remove_duplicate=False):
        yield name, buffer, False


def view_key(tensor: Tensor) -> tuple[object, ...] | None:
    """Identifies `parameter.data`, which makes a new tensor on the same memory without an operator."""
    if tensor.device.type == "meta" or tensor.layout != torch.strided or tensor.numel() == 0:
        return None
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
