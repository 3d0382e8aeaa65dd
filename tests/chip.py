"""A pretend accelerator: tensors on a device "chip", computed on the CPU, that tell what a real one hides.

    waits      what makes the host wait for the device: a number or a shape that is read off a tensor
               (`_local_scalar_dense`, `nonzero`, `masked_select`, `equal`, an index by a bool tensor, …), a
               copy to the host or to the device that is not `non_blocking` (into memory that is there
               already: whether it is page-locked cannot be told here; a new tensor on the host never is)
    refused    one operator on tensors of two devices (numbers of no dimension aside, as on a real one)

Values are real, so the whole loop runs on it, decisions included. It takes torch's one private device type:
in a process of its own only (`workers.ranks`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Chip", "OnChip", "chip", "to_chip"]

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten._unique,
    aten._unique2, aten.unique_consecutive, aten.unique_dim, aten.item,
}  # fmt: skip
COPIES = {aten._to_copy, aten.copy_, aten.set_}


class OnChip(Tensor):
    """A tensor there; `raw`: its values."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor, device: torch.device) -> OnChip:
        with torch._C.DisableTorchFunction():  # who listens to sizes hears the model's, not these
            made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
                device=device,
            )  # fmt: skip
        made.raw = raw
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, other: OnChip) -> None:
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.raw = other.raw

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnChip({self.raw!r})"


class Chip(TorchDispatchMode):
    """While it is entered tensors can be made there; `waits`: what was waited for, operator -> times."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if waited := _waits(func, args, kwargs):
            self.waits[waited] += 1
        return _run(func, args, kwargs)

    @contextmanager
    def counted(self) -> Iterator[Counter[str]]:
        """What is waited for within."""
        before, self.waits = self.waits, Counter()
        try:
            yield self.waits
        finally:
            self.waits = before + self.waits


def chip() -> Chip:
    """The device, once per process."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("chip")
    return Chip()


def to_chip(module: nn.Module, device: str = "chip:0") -> nn.Module:
    """Its parameters and buffers, there."""
    where = torch.device(device)
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None and not isinstance(parameter, OnChip):
                data = OnChip(parameter.detach(), where)
                part._parameters[name] = nn.Parameter(data, parameter.requires_grad)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None and not isinstance(buffer, OnChip):
                part._buffers[name] = OnChip(buffer, where)
    return module


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    tensors = _tensors(args, kwargs)
    there = {x.device for x in tensors if isinstance(x, OnChip)}
    mixed = there | {x.device for x in tensors if x.ndim}
    if len(mixed) > 1 and func.overloadpacket not in COPIES:
        raise RuntimeError(f"{func}: tensors on {' and '.join(sorted(map(str, mixed)))}")
    out = func(*_each(_raw, args), **{key: _each(_raw, x) for key, x in kwargs.items()})
    asked = kwargs.get("device")
    device = torch.device(asked) if asked is not None else next(iter(there), torch.device("cpu"))
    if func.overloadpacket is aten.copy_:
        return args[0]
    if device.type != "chip":
        return out
    device = torch.device("chip", device.index or 0)
    known = {id(x.raw): x for x in tensors if isinstance(x, OnChip)}

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return known[id(x)] if id(x) in known else OnChip(x, device)

    return _each(wrapped, out)


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)([_each(function, x) for x in value])
    return function(value)


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _each(lambda x: found.append(x) if isinstance(x, Tensor) else None, [args, [*kwargs.values()]])
    return found


def _raw(value: Any) -> Any:
    if isinstance(value, OnChip):
        return value.raw
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _waits(func: Any, args: Any, kwargs: Any) -> str:
    """What the host waits for here, or ''."""
    tensors = _tensors(args, kwargs)
    there = any(isinstance(x, OnChip) for x in tensors)
    operator = func.overloadpacket
    if operator is aten.copy_:
        apart = isinstance(args[0], OnChip) != isinstance(args[1], OnChip)
        blocks = not (len(args) > 2 and args[2]) and not kwargs.get("non_blocking")
        if not (apart and blocks):
            return ""
        return "to the device" if isinstance(args[0], OnChip) else "to the host"
    if operator is aten._to_copy:
        asked = kwargs.get("device")
        then = tensors[0].device.type if asked is None else torch.device(asked).type
        if then == tensors[0].device.type:
            return ""
        if there:
            return "to the host"
        return "" if kwargs.get("non_blocking") else "to the device"
    if not there:
        return ""
    if operator is aten.repeat_interleave and kwargs.get("output_size") is None:
        return "aten.repeat_interleave"
    masked = operator in (aten.index, aten.index_put, aten.index_put_) and any(
        isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1]
    )
    return str(operator) if operator in READS or masked else ""
