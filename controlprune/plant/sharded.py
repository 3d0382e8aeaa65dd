"""Sharded parameters: FSDP2 (`fully_shard`), HSDP and tensor parallelism, whose parameters are DTensors.

A rank holds a window of each parameter, positions a … a + k − 1 of some dimension. To the plant that is a
tensor like any other, its extent there a `Window`: masks, parked columns and rows at rest are index
arithmetic on the local part, in place, with no communication. Of a sum over units a rank has what it holds:

    Σ_{reader columns} ⟨w, ∂w⟩  =  Σ_ranks of the local sums            one all-reduce of U float32 numbers

where a part that several ranks hold alike (HSDP, replicated norms) is counted by the lowest of them.
Gradients are averaged over the data by then: n ranks of B examples see what one process with n·B would.

Shapes stay: a physical shrink is refused (`Control(shrink=False)`); the small model is made of the gathered
weights at the end. The trace is made before the parameters are sharded::

    traced = cp.trace(model, example_inputs)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    controller = cp.attach(model, optimizer, example_inputs=traced, policy=cp.Control(shrink=False), …)
    …
    small = controller.finalize(into=Net())        on every rank; `Net()`: a plain dense one

Known limits: tensors keep their shapes (masks only), so there are no looks; Adafactor and
LBFGS, whose state is not laid out as the parameter is, are refused; what is parked is saved per rank, and
goes back to as many ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..structure.extents import Window
from ..structure.groups import Structure
from .base import named_tensors
from .hooks import Link
from .layout import Spot
from .plant import Plant, spots_of

__all__ = ["ShardedPlant"]

REFUSED = (torch.optim.LBFGS, torch.optim.Adafactor)


class ShardedPlant(Plant):
    """A plant on the parts of the parameters that this rank holds; masked layout only."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, structure: Structure) -> None:
        if isinstance(optimizer, REFUSED):
            raise ValueError(
                f"optimizer: {type(optimizer).__name__} keeps state of another layout than the parameters', "
                "which cannot be sharded with them; use SGD, Adam or AdamW"
            )
        tensors = named_tensors(_resharded(model))
        self._group = _group_of(tensors)
        self._windows = {name: _window(tensor) for name, tensor in tensors.items()}
        self._wholes = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
        self._parts = {name: _part(tensor) for name, tensor in tensors.items()}
        view: Any = _LocalOptimizer(optimizer, {self._parts[n]: w for n, w in self._wholes.items()})
        self._mine: frozenset[str] = frozenset()
        super().__init__(model, view, structure)
        self._mine = self._first_holder()

    # --- what of the model is here ---------------------------------------------------------------

    @property
    def group(self) -> dist.ProcessGroup | None:
        return self._group

    def tensors(self) -> dict[str, Tensor]:
        return self._parts

    @property
    def place(self) -> str:
        return f"rank {dist.get_rank(self._group)} of {dist.get_world_size(self._group)}"

    def own(self, name: str, tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor):
            return tensor.to_local()
        for dim, (start, length) in enumerate(self._windows[name]):
            tensor = tensor.narrow(dim, start, length)
        return tensor

    def _laid_on(self) -> tuple[Spot, ...]:
        local = {
            name: tuple(
                extent if length == total else Window(extent, start, length)
                for extent, (start, length), total in zip(
                    extents, self._windows[name], self._shape(name), strict=True
                )
            )
            for name, extents in self.structure.tensors.items()
            if name in self._windows and len(extents) == len(self._windows[name])
        }
        return spots_of(replace(self.structure, tensors=local))

    def _shape(self, name: str) -> torch.Size:
        return (self._wholes[name] if name in self._wholes else self._parts[name]).shape

    @property
    def _counted(self) -> tuple[Spot, ...]:
        return tuple(spot for spot in self._spots if spot.name in self._mine)

    def _first_holder(self) -> frozenset[str]:
        """The tensors whose part here no lower rank holds too."""
        names = [spot.name for spot in self._spots]
        rows = [[x for pair in self._windows[name] for x in pair] for name in names]
        width = max((len(row) for row in rows), default=0)
        table = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self._device)
        tables = [torch.empty_like(table) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(tables, table, group=self._group)
        lower = tables[: dist.get_rank(self._group)]
        taken = [any(bool((other[k] == table[k]).all()) for other in lower) for k in range(len(names))]
        return frozenset(name for name, gone in zip(names, taken, strict=True) if not gone)

    @property
    def _device(self) -> torch.device:
        return next(iter(self._parts.values())).device

    # --- masks -----------------------------------------------------------------------------------

    def apply(self, masks: Sequence[Tensor], *, compact: bool) -> None:
        if compact:
            raise RuntimeError(
                "shrink: sharded parameters keep their shapes; attach with policy=cp.Control(shrink=False); "
                "get the small model at the end by controller.finalize(into=model), model a plain dense one"
            )
        _resharded(self.model)
        self._fetch_gradients()
        super().apply(masks, compact=False)

    def harden(self) -> None:
        """Masked for good: what is parked is dropped, no hook is left."""
        self._unhook()
        self._hardened = True
        self._spots, self._gather = (), None

    def _hook(self, tensors: Mapping[str, Tensor]) -> None:
        super()._hook(tensors)
        if self._rest is None:
            return
        for name, watch in self._rest.watches.items():
            if name in self._wholes:
                hook = self._arrival(name, watch.brought)
                self._rest.handles.append(self._wholes[name].register_post_accumulate_grad_hook(hook))
        if self._rest.watches:
            self._rest.handles.append(self.model.register_forward_pre_hook(Link(self, ShardedPlant._settle)))

    def _arrival(self, name: str, brought: Callable[[], None]) -> Callable[[Tensor], None]:
        def arrived(whole: Tensor) -> None:
            self._fetch(name)
            brought()

        return arrived

    def _settle(self, model: nn.Module, args: Any) -> None:
        """Before new gradients come: records at the scale that gradients have now, none if there are none."""
        self._fetch_gradients()
        for watch in () if self._rest is None else self._rest.watches.values():
            watch.settle()

    def gathered(self, model: nn.Module) -> nn.Module:
        """A collective, one tensor after the other."""
        tensors = named_tensors(model)
        with torch.no_grad():
            for name, part in self._parts.items():
                whole = self._wholes.get(name)
                tensors[name].copy_(part if whole is None else whole.full_tensor())
        small = Plant(model, None, self.structure)
        small.apply(self.masks, compact=True)
        small.harden()
        return model

    # --- statistics ------------------------------------------------------------------------------

    @property
    def has_gradients(self) -> bool:
        return any(whole.grad is not None for whole in self._wholes.values())

    def gate_gradient(self, only: Collection[int] | None = None) -> Tensor:
        self._fetch_gradients()
        if only is not None:
            only = {id(self._parts[name]) for name, whole in self._wholes.items() if id(whole) in only}
        return self._summed_over_ranks(super().gate_gradient(only))

    def weight_norms(self) -> list[Tensor]:
        found = torch.cat(super().weight_norms())
        return list(self._summed_over_ranks(found).split(self.structure.sizes))

    def _summed_over_ranks(self, values: Tensor) -> Tensor:
        values = values.to(self._device, copy=True)
        dist.all_reduce(values, group=self._group)
        return values

    def _fetch_gradients(self) -> None:
        for name in self._wholes:
            self._fetch(name)

    def _fetch(self, name: str) -> None:
        """The part of `whole.grad` as the gradient of the part: the same memory."""
        whole, part = self._wholes[name], self._parts[name]
        part.grad = None if whole.grad is None else _local_gradient(whole)

    # --- saved -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | {"rank": self._place()}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        place = saved.get("rank")
        if not isinstance(place, Tensor) or place.tolist() != self._place().tolist():
            raise ValueError(f"saved: it is not of {self.place}; give each rank what it saved")
        super().load_state_dict({key: value for key, value in saved.items() if key != "rank"})

    def _place(self) -> Tensor:
        return torch.tensor([dist.get_rank(self._group), dist.get_world_size(self._group)])


class _LocalState(Mapping[Tensor, dict[str, Any]]):
    """The optimizer's state of each part: views of what it keeps of the whole."""

    def __init__(self, optimizer: Optimizer, wholes: Mapping[Tensor, DTensor]) -> None:
        self.optimizer, self.wholes = optimizer, wholes

    def __getitem__(self, part: Any) -> dict[str, Any]:
        entries = self.optimizer.state[self.wholes.get(part, part)]
        return {key: x.to_local() if isinstance(x, DTensor) else x for key, x in entries.items()}

    def __iter__(self) -> Iterator[Tensor]:
        parts: dict[Any, Tensor] = {whole: part for part, whole in self.wholes.items()}
        return (parts.get(p, p) for p in self.optimizer.state)

    def __len__(self) -> int:
        return len(self.optimizer.state)

    def __contains__(self, part: Any) -> bool:
        return self.wholes.get(part, part) in self.optimizer.state


class _LocalOptimizer:
    """What the plant needs of an optimizer, on the parts."""

    def __init__(self, optimizer: Optimizer, wholes: Mapping[Tensor, DTensor]) -> None:
        self.state = _LocalState(optimizer, wholes)
        self.register_step_pre_hook = optimizer.register_step_pre_hook
        self.register_step_post_hook = optimizer.register_step_post_hook


def _part(tensor: Tensor) -> Tensor:
    """A plain tensor over the local memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        local = tensor.to_local().detach()
    return nn.Parameter(local, requires_grad=tensor.requires_grad)


def _local_gradient(whole: DTensor) -> Tensor:
    gradient = whole.grad
    assert isinstance(gradient, DTensor)
    if gradient.placements != whole.placements:
        raise ValueError(
            f"model: a gradient lies as {gradient.placements}, its parameter as {whole.placements}; give "
            "both the same placements"
        )
    return gradient.to_local()


def _window(tensor: Tensor) -> tuple[tuple[int, int], ...]:
    """(start, length) per dimension of what this rank holds."""
    if not isinstance(tensor, DTensor):
        return tuple((0, n) for n in tensor.shape)
    (chunk,) = tensor.__create_chunk_list__()
    return tuple(zip(chunk.offsets, chunk.sizes, strict=True))


def _group_of(tensors: Mapping[str, Tensor]) -> dist.ProcessGroup:
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


def _resharded(model: nn.Module) -> nn.Module:
    """With its sharded parameters in place, not the gathered ones that an evaluation leaves."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return model
