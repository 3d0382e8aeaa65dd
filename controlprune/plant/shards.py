"""Shards: what this process holds of every tensor, of its gradient and of its optimizer state.

    whole     the parameter as the user has it, a DTensor; or a plain tensor, held alike by all
    part      a plain tensor over the local memory of a whole
    window    (start, length) per dimension: where the part lies in the whole

All that the plant asks of torch.distributed is here; its private API of FSDP2 is in plant/fsdp.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..structure.extents import Window
from ..structure.groups import Structure
from .base import named_tensors
from .fsdp import resharded, sharded_like
from .layout import Index, Spot, select
from .plant import spots_of

__all__ = ["LocalOptimizer", "Shards", "Windows", "cut", "full", "inside", "narrowed"]

Windows = tuple[tuple[int, int], ...]


class Shards:
    """The tensors of a model and the state of its optimizer, as they lie here. `dense`: the dense windows."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        tensors = named_tensors(resharded(model))
        self.group = group_of(tensors)
        self.wholes = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.keeper = optimizer
        self.state = LocalState(optimizer, {})
        self.take(tensors)
        self.dense = self.windows

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """They lie so from here on."""
        self.parts = {name: part_of(tensor) for name, tensor in tensors.items()}
        self.windows = {name: window_of(tensor) for name, tensor in tensors.items()}
        self.state.wholes = {self.parts[name]: whole for name, whole in self.wholes.items()}

    @property
    def device(self) -> torch.device:
        return next(iter(self.parts.values())).device

    def own(self, name: str, tensor: Tensor) -> Tensor:
        """What is here of a tensor that lies as that of this name does now."""
        return tensor.to_local() if isinstance(tensor, DTensor) else narrowed(tensor, self.windows[name])

    def spots(self, structure: Structure, windows: Mapping[str, Windows]) -> tuple[Spot, ...]:
        """Those of the structure, each a window of its dense tensor."""
        local = {
            name: tuple(
                extent if length == total else Window(extent, start, length)
                for extent, (start, length), total in zip(
                    extents, windows[name], self.shapes[name], strict=True
                )
            )
            for name, extents in structure.tensors.items()
            if name in windows and len(extents) == len(windows[name])
        }
        return spots_of(replace(structure, tensors=local))

    def first_held(self, names: Sequence[str]) -> frozenset[str]:
        """Those whose part here no lower rank holds too; a collective."""
        rows = [[x for pair in self.windows[name] for x in pair] for name in names]
        width = max((len(row) for row in rows), default=0)
        table = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.device)
        tables = [torch.empty_like(table) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(tables, table, group=self.group)
        taken = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        for lower in tables[: dist.get_rank(self.group)]:  # not tensor by tensor
            taken |= (lower == table).all(1)
        return frozenset(name for name, gone in zip(names, taken.tolist(), strict=True) if not gone)

    def summed(self, values: Tensor) -> Tensor:
        """Over the ranks; a collective."""
        values = values.to(self.device, copy=True)
        dist.all_reduce(values, group=self.group)
        return values

    def fetch(self, name: str) -> None:
        """The part of `whole.grad` as the gradient of the part: the same memory."""
        whole, part = self.wholes[name], self.parts[name]
        part.grad = None if whole.grad is None else local_gradient(whole)

    def fetch_gradients(self) -> None:
        for name in self.wholes:
            self.fetch(name)

    def travelling(self, whole: DTensor) -> dict[str, DTensor]:
        """The optimizer's state of the parameter's own shape."""
        entries = self.keeper.state.get(whole, {})
        return {k: x for k, x in entries.items() if isinstance(x, DTensor) and x.shape == whole.shape}

    def joined(self, part: Tensor, name: str) -> Tensor:
        """The dense tensor of which every rank holds `part`; a collective."""
        whole, shape = self.wholes[name], self.shapes[name]
        stride = torch.empty(shape, device="meta").stride()
        joined = DTensor.from_local(
            part, whole.device_mesh, whole.placements, run_check=False, shape=shape, stride=stride
        )
        return full(joined)


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

    def __init__(self, shards: Shards) -> None:
        self.state = shards.state
        self.register_step_pre_hook = shards.keeper.register_step_pre_hook
        self.register_step_post_hook = shards.keeper.register_step_post_hook


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


def window_of(tensor: Tensor) -> Windows:
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


def narrowed(tensor: Tensor, windows: Windows) -> Tensor:
    for dim, (start, length) in enumerate(windows):
        tensor = tensor.narrow(dim, start, length)
    return tensor


def cut(tensor: Tensor, whole: DTensor, live: Index) -> DTensor:
    """Live entries of a tensor that lay as `whole` did, as it lies now; a collective."""
    small = narrowed(select(full(tensor), live), window_of(whole))
    return sharded_like(whole, small.clone(memory_format=torch.contiguous_format))
