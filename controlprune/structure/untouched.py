"""Whatever runs inside leaves no trace: the model, what it refers to, inputs and random states are put back.

Everything that a forward pass can reach from the model is remembered first and put back in place, so that
objects stay the user's own:

    modules, plain objects      their attributes; so do the classes of the model's code
    dict, list, set, deque      their contents
    tensors, numpy arrays       their values, `requires_grad`, `.grad`
    functions (hooks)           what they close over, their defaults
    generators                  torch's on every device in use, Python's, numpy's, those the model holds

What lies beyond (a file that is written, a module's globals) is not. Optimizers and data sets that a model
may refer to are no part of it, and the search ends after `OBJECTS` of them, nearest first.
"""

from __future__ import annotations

import functools
import operator
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

__all__ = ["Memory", "seed_all", "seeded", "untouched"]

OBJECTS = 200_000
CONTAINERS = (dict, list, set, deque, bytearray)
CLOSED = (str, bytes, int, float, complex, type(None), range, slice, torch.dtype, torch.device, torch.Size)
APART = (type, ModuleType, BuiltinFunctionType, Optimizer, DataLoader, Dataset)

Restore = Callable[[], object]


@contextmanager
def untouched(model: nn.Module, inputs: object = None, *, weights: bool = True) -> Iterator[None]:
    """Inside, anything may be done with the model and `inputs`; `weights`: may parameters be written, too?"""
    with Memory(model, inputs, weights=weights).kept():
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The host's random numbers come from `seed`; `torch.manual_seed` would start those of devices anew."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def seed_all(seed: int) -> None:
    """What `torch.manual_seed` does, of the devices in use only: it would reach one that is used later."""
    for generator in _default_generators():
        generator.manual_seed(seed)


def _default_generators() -> list[torch.Generator]:
    found = [torch.default_generator]
    if torch.cuda.is_initialized():
        found += torch.cuda.default_generators
    if torch.xpu.is_initialized():
        found += torch.xpu.default_generators
    if torch.backends.mps.is_available():
        found.append(torch.mps._get_default_mps_generator())
    return found


class Memory:
    """What was there, nearest first, and how to put each thing back: as often as one likes."""

    def __init__(self, model: nn.Module, inputs: object = None, *, weights: bool = True) -> None:
        self.parameters = {id(p) for p in model.parameters()}
        self.seen = set() if weights else set(self.parameters)
        self.alive: list[object] = []  # so that no two have one id
        self.restores: list[Restore] = []
        self.weights: list[Restore] = []  # of the model's parameters
        self.copies: dict[int, list[Tensor]] = {}  # of a tensor's values, by its id
        self.waiting: deque[object] = deque()
        self._remember(model, inputs)

    @contextmanager
    def kept(self, *, weights: bool = True) -> Iterator[None]:
        """After it all is as it was remembered (`weights`: parameters too), and random states as before."""
        generators = [(generator, generator.get_state()) for generator in _default_generators()]
        python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 — the user's code may
        try:
            yield
        finally:
            self.restore(weights=weights)
            for generator, state in generators:
                generator.set_state(state)
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002

    def _remember(self, *roots: object) -> None:
        self._expect(*roots)
        while self.waiting and len(self.alive) < OBJECTS:
            value = self.waiting.popleft()
            self.alive.append(value)
            self._look_at(value)

    def restore(self, *, weights: bool = True) -> None:
        with torch.no_grad():
            for restore in (*self.restores, *(self.weights if weights else ())):
                restore()

    def drop_copies(self, tensors: Iterable[Tensor]) -> None:
        """Of those among `tensors` that are as they were: nothing is expected to write them any more."""
        for tensor in tensors:
            copies = self.copies.get(id(tensor), [])
            if copies and tensor.shape == copies[0].shape and _same(tensor.detach(), copies[0]):
                copies.clear()

    def _expect(self, *values: object) -> None:
        for value in values:
            if not isinstance(value, CLOSED) and id(value) not in self.seen:
                self.seen.add(id(value))
                self.waiting.append(value)

    def _look_at(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, np.ndarray):
            self.restores.append(functools.partial(np.copyto, value, value.copy()))
        elif (state := _random_state(value)) is not None:
            self.restores.append(state)
        elif isinstance(value, FunctionType):
            self._expect(*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
            self._expect(*(value.__closure__ or ()))
            self._attributes(value)
        elif isinstance(value, CellType):
            self._cell(value)
        elif isinstance(value, MethodType):
            self._expect(value.__self__, value.__func__)
        elif isinstance(value, functools.partial):
            self._expect(value.func, value.args, value.keywords)
        elif not isinstance(value, APART):
            self._object(value)

    def _object(self, value: Any) -> None:
        if isinstance(value, CONTAINERS):
            self._contents(value)
        elif isinstance(value, (tuple, frozenset)):
            self._expect(*value)
        self._attributes(value)
        if isinstance(value, nn.Module):
            for kind in type(value).__mro__:
                if (
                    kind.__module__.partition(".")[0] not in ("torch", "builtins")
                    and id(kind) not in self.seen
                ):
                    self.seen.add(id(kind))
                    self._class(kind)

    def _attributes(self, value: Any) -> None:
        held = getattr(value, "__dict__", None)
        if isinstance(held, dict):
            before = dict(held)
            self.restores.append(functools.partial(_refill, held, before))
            self._expect(*held.values())
        for name in (n for kind in type(value).__mro__ for n in _slots(kind) if hasattr(value, n)):
            slot = getattr(value, name)
            self.restores.append(functools.partial(_set_again, value, name, slot))
            self._expect(slot)

    def _class(self, kind: type) -> None:
        """Counters and caches of the class itself, and what its methods close over."""
        for name, value in list(vars(kind).items()):
            if isinstance(value, (FunctionType, staticmethod, classmethod)):
                self._expect(getattr(value, "__func__", value))
            elif not name.startswith("__") and not hasattr(value, "__get__"):
                self.restores.append(functools.partial(_set_again, kind, name, value))
                self._expect(value)

    def _contents(self, value: Any) -> None:
        before = dict(value) if isinstance(value, dict) else value.copy()
        if isinstance(value, dict):
            self.restores.append(functools.partial(_refill, value, before))
            self._expect(*value.values())
        elif isinstance(value, set):
            self.restores.append(lambda: None if value == before else (value.clear(), value.update(before)))
        else:
            self.restores.append(
                lambda: None if _alike(value, before) else (value.clear(), value.extend(before))
            )
            if not isinstance(value, bytearray):
                self._expect(*value)

    def _cell(self, cell: CellType) -> None:
        with suppress(ValueError):  # an empty one
            content = cell.cell_contents
            self.restores.append(functools.partial(setattr, cell, "cell_contents", content))
            self._expect(content)

    def _tensor(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta" or tensor.is_inference():
            return
        flag, data = tensor.requires_grad, tensor.data
        gradient = tensor.grad if tensor.is_leaf else None
        copies = self.copies[id(tensor)] = [data.clone()]
        self._expect(gradient)

        def restore() -> None:
            if tensor.shape != data.shape or _address(tensor) != _address(data):
                tensor.data = data
            for value in copies:
                if not _same(data, value):
                    data.copy_(value)
            if tensor.is_leaf and tensor.grad is not gradient:
                tensor.grad = gradient
            if tensor.is_leaf and tensor.requires_grad != flag:
                tensor.requires_grad_(flag)

        (self.weights if id(tensor) in self.parameters else self.restores).append(restore)


def _random_state(value: Any) -> Restore | None:
    """How to put back the state of a generator, if it is one."""
    if isinstance(value, torch.Generator):
        return functools.partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return functools.partial(value.setstate, value.getstate())
    if isinstance(value, np.random.Generator):
        return functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return functools.partial(value.set_state, value.get_state())
    return None


def _slots(kind: type) -> list[str]:
    names = vars(kind).get("__slots__", ())
    return [n for n in ([names] if isinstance(names, str) else names) if n not in ("__dict__", "__weakref__")]


def _set_again(owner: Any, name: str, value: object) -> None:
    if getattr(owner, name, owner) is not value:
        with suppress(AttributeError, TypeError):  # what cannot be set was not set
            setattr(owner, name, value)


def _refill(held: dict[Any, Any], before: dict[Any, Any]) -> None:
    same = len(held) == len(before) and all(map(operator.is_, held, before))
    if not (same and all(map(operator.is_, held.values(), before.values()))):
        held.clear()
        held.update(before)


def _refill_row(held: Any, before: Any) -> None:
    if not (held == before if isinstance(held, set) else _alike(held, before)):
        held.clear()
        held.update(before) if isinstance(held, set) else held.extend(before)


def _alike(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _address(tensor: Tensor) -> int:
    """Where its numbers lie; 0 of a sparse one, which has several places."""
    return tensor.data_ptr() if tensor.layout == torch.strided else 0


def _same(a: Tensor, b: Tensor) -> bool:
    try:
        return torch.equal(a, b)
    except RuntimeError:  # a kind of tensor that cannot be compared
        return False
