"""Sizes as the model's code reads them: `x.shape`, `x.size(1)`, `x.numel()` give ints that are followed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from .seen import Seen, SeenInt, Term, give, is_rough, plain, take

__all__ = ["GONE", "SizeReader", "argument", "has_seen", "plainly", "seen_numbers", "take_all"]

COUNTS = (Tensor.numel, Tensor.nelement, torch.numel)
GONE = (Tensor.stride, Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.nbytes.__get__)  # type: ignore[attr-defined]
READS = (Tensor.shape.__get__, Tensor.size, Tensor.__len__, *COUNTS, *GONE)  # type: ignore[attr-defined]

MADE_OF = ("tensor", "as_tensor", "asarray", "scalar_tensor", "new_tensor", "arange", "linspace")  # numbers
FILLED = {"full": 1, "new_full": 2, "full_like": 1}  # with the argument there


class SizeReader(TorchFunctionMode):
    """Inside, sizes that are read are followed; torch's functions get plain ones."""

    def terms_of(self, tensor: Tensor) -> Sequence[Term]:
        """What its sizes are."""
        return list(tensor.shape)

    def called(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What happens with any other function."""
        if not has_seen((args, tuple(kwargs.values()))):
            return func(*args, **kwargs)
        result = func(*plainly(args), **{name: plainly(value) for name, value in kwargs.items()})
        name, values = getattr(func, "__name__", ""), (args, tuple(kwargs.values()))
        told = name in MADE_OF or isinstance(result, (int, float, torch.Size))
        for number in seen_numbers(values if told else filling(args, kwargs, FILLED.get(name))):
            give(number)
        for number in () if told else seen_numbers(values):
            if is_rough(number.term):
                self.given_to(func, args, kwargs, result, number)
        return result

    def given_to(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any, number: Seen) -> None:
        """What happens with a number among the arguments that can be the same for two widths."""
        give(number)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in READS:
            return self.called(func, args, kwargs)
        read, terms = func(*args, **kwargs), self.terms_of(args[0])
        sizes: list[Any] = [SeenInt(n, term) for n, term in zip(args[0].shape, terms, strict=True)]
        if isinstance(read, torch.Size):
            return torch.Size(sizes)
        if func in COUNTS:
            return math.prod(sizes)
        if func is Tensor.__len__:  # len() makes it a plain int
            give(sizes[0])
            return read
        if func in GONE:  # what comes back tells its sizes, and is not followed
            for size in sizes:
                give(size)
            return read
        return sizes[argument(args, kwargs, 1, "dim")]


def argument(
    args: Sequence[Any], kwargs: dict[str, Any], position: int, name: str, default: Any = None
) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


def has_seen(value: object) -> bool:
    """Is there a followed number in it?"""
    kind = type(value)
    if kind is Tensor or kind is Parameter:  # most arguments
        return False
    if issubclass(kind, (tuple, list)):
        return any(map(has_seen, value))  # type: ignore[arg-type]
    return next(seen_numbers(value), None) is not None


def filling(args: Any, kwargs: dict[str, Any], position: int | None) -> Any:
    """What a tensor is filled with, given there or by its name."""
    return () if position is None else argument(args, kwargs, position, "fill_value", ())


def seen_numbers(value: object) -> Iterator[Seen]:
    """The followed numbers in it."""
    if isinstance(value, Seen):
        yield value
    elif isinstance(value, slice):
        yield from seen_numbers((value.start, value.stop, value.step))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from seen_numbers(item)


def take_all(args: Any, kwargs: dict[str, Any]) -> None:
    """torch computes with the followed numbers among the arguments."""
    for number in seen_numbers((args, tuple(kwargs.values()))):
        take(number)


def plainly(value: Any) -> Any:
    """The same with plain numbers."""
    if isinstance(value, Seen):
        return plain(value)
    if isinstance(value, slice):
        return slice(plain(value.start), plain(value.stop), plain(value.step))
    if isinstance(value, (tuple, list)) and has_seen(value):
        kind = list if isinstance(value, list) else tuple
        return kind(plainly(item) for item in value)
    return value
