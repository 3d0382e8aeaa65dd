"""Sizes as the model's code reads them: `x.shape`, `x.size(1)`, `x.numel()` give ints that are followed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .seen import Seen, SeenInt, Term, lose, plain

__all__ = ["SizeReader", "argument", "has_seen", "plainly"]

READS = (Tensor.shape.__get__, Tensor.size, Tensor.numel, Tensor.__len__)  # type: ignore[attr-defined]


class SizeReader(TorchFunctionMode):
    """Inside, sizes that are read are followed; torch's functions get plain ones."""

    def terms_of(self, tensor: Tensor) -> Sequence[Term]:
        """What its sizes are."""
        return list(tensor.shape)

    def called(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What happens with any other function."""
        return func(*plainly(args), **{name: plainly(value) for name, value in kwargs.items()})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in READS:
            return self.called(func, args, kwargs)
        read, terms = func(*args, **kwargs), self.terms_of(args[0])
        sizes = [SeenInt(n, term) for n, term in zip(args[0].shape, terms, strict=True)]
        if isinstance(read, torch.Size):
            return torch.Size(sizes)
        if func is Tensor.numel:
            return math.prod(sizes)
        if func is Tensor.__len__:  # len() makes it a plain int
            lose(sizes[0], through=3)  # this file, torch/overrides.py, torch/_tensor.py
            return read
        return sizes[argument(args, kwargs, 1, "dim")]


def argument(
    args: Sequence[Any], kwargs: dict[str, Any], position: int, name: str, default: Any = None
) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


def has_seen(value: object) -> bool:
    """Is there a followed number in it?"""
    if isinstance(value, Seen):
        return True
    if isinstance(value, slice):
        return isinstance(value.start, Seen) or isinstance(value.stop, Seen)
    return isinstance(value, (tuple, list)) and any(has_seen(item) for item in value)


def plainly(value: Any) -> Any:
    """The same with plain numbers."""
    if isinstance(value, Seen):
        return plain(value)
    if isinstance(value, slice):
        return slice(plain(value.start), plain(value.stop), plain(value.step))
    if type(value) in (tuple, list) and has_seen(value):
        return type(value)(plainly(item) for item in value)
    return value
