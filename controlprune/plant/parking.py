"""Where what is parked waits while the net is shrunk: beside the live tensors, or on another device.

An accelerator copies to page-locked memory of the host by itself: a shrink with `park_on="cpu"` waits for
nothing, nor does an expansion. Where no memory can be locked it is an ordinary copy. What the host itself
reads of it (for a checkpoint) it reads after `settle`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["fetched", "parked", "settle"]


def parked(tensor: Tensor, device: torch.device | None) -> Tensor:
    """`tensor` on that device (None: where it is); from an accelerator to the host nobody waits."""
    if device is None or device == tensor.device:
        return tensor
    if device.type != "cpu":
        return tensor.to(device, non_blocking=True)
    return _locked(tensor).copy_(tensor, non_blocking=True)


def fetched(home: Tensor, live: Tensor) -> Tensor:
    """What is parked, back beside `live`, in its number type."""
    return home.to(live.device, live.dtype, non_blocking=True)


def settle(devices: Iterable[torch.device]) -> None:
    """Wait until what these devices were told to copy is there."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _locked(like: Tensor) -> Tensor:
    if like.is_cuda:
        try:
            return torch.empty_like(like, device="cpu", pin_memory=True)
        except RuntimeError:  # the system locks no more
            pass
    return torch.empty_like(like, device="cpu")
