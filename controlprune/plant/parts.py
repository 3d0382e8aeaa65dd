"""Parts of DTensors: what this process holds of one, of its gradient and of its optimizer state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

__all__ = [
    "LocalOptimizer",
    "Windows",
    "full",
    "group_of",
    "inside",
    "local_gradient",
    "part_of",
    "piece",
    "window_of",
]

Windows = tuple[tuple[int, int], ...]  # (start, length) per dimension


class LocalState(Mapping[Tensor, dict[str, Any]]):
    """The optimizer's state of each part: views of what it keeps of the whole."""

    def __init__(self, optimizer: Optimizer, wholes: Mapping[Tensor, DTensor]) -> None:
        self.optimizer, self.wholes = optimizer, wholes

    def __getitem__(self, part: Any) -> dict[str, Any]:
        whole = self.wholes.get(part, part)
        if whole not in self.optimizer.state:  # a defaultdict: it would make an entry
            raise KeyError("no state yet")
        entries = self.optimizer.state[whole]
        return {key: x.to_local() if isinstance(x, DTensor) else x for key, x in entries.items()}

    def __iter__(self) -> Iterator[Tensor]:
        parts: dict[Any, Tensor] = {whole: part for part, whole in self.wholes.items()}
        return (parts.get(p, p) for p in self.optimizer.state)

    def __len__(self) -> int:
        return len(self.optimizer.state)

    def __contains__(self, part: Any) -> bool:
        return self.wholes.get(part, part) in self.optimizer.state


class LocalOptimizer:
    """What the plant needs of an optimizer, on the parts."""

    def __init__(self, optimizer: Optimizer, wholes: Mapping[Tensor, DTensor]) -> None:
        self.state = LocalState(optimizer, wholes)
        self.register_step_pre_hook = optimizer.register_step_pre_hook
        self.register_step_post_hook = optimizer.register_step_post_hook


def part_of(tensor: Tensor) -> Tensor:
    """A plain tensor over the local memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        local = tensor.to_local().detach()
    return nn.Parameter(local, requires_grad=tensor.requires_grad)


def local_gradient(whole: DTensor) -> Tensor:
    gradient = whole.grad
    assert isinstance(gradient, DTensor)
    if gradient.placements != whole.placements:
        raise ValueError(
            f"model: a gradient lies as {gradient.placements}, its parameter as {whole.placements}; give "
            "both the same placements"
        )
    return gradient.to_local()


def window_of(tensor: Tensor) -> tuple[tuple[int, int], ...]:
    """(start, length) per dimension of what this rank holds."""
    if not isinstance(tensor, DTensor):
        return tuple((0, n) for n in tensor.shape)
    (chunk,) = tensor.__create_chunk_list__()
    return tuple(zip(chunk.offsets, chunk.sizes, strict=True))


def group_of(tensors: Mapping[str, Tensor]) -> dist.ProcessGroup:
    """The processes over which the parameters are spread."""
    meshes = [tensor.device_mesh for tensor in tensors.values() if isinstance(tensor, DTensor)]
    mesh = max(meshes, key=lambda mesh: mesh.size())
    if mesh.size() == dist.get_world_size():
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    if mesh.ndim == 1:
        return mesh.get_group()
    raise ValueError(
        f"model: its device mesh holds {mesh.size()} of {dist.get_world_size()} processes in {mesh.ndim} "
        "dimensions; give one over all processes, or one of one dimension"
    )


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def inside(live: Tensor, start: int, length: int) -> tuple[int, int]:
    """(first, how many) of the live positions that lie in a dense window."""
    first = int((live < start).sum())
    return first, int((live < start + length).sum()) - first


def piece(tensor: Tensor, window: Mapping[int, tuple[int, int]]) -> Tensor:
    whole = full(tensor)
    for dim, (start, length) in window.items():
        whole = whole.narrow(dim, start, length)
    return whole
