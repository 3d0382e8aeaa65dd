"""Sizes that the model's code writes into a view, and that do not follow when units leave: they are inferred.

    B, T, C = x.size()
    k.view(B, T, n, C // n)    ->    k.view(B, T, n, -1)
    y.view(B, T, C)            ->    y.view(B, T, -1)

The last of the sizes is what the others leave. As long as the code is right about it that is the same number:
the dense model computes what it computed. Modules of the classes in which a view failed in the numeric check
are tried so (structure/analyse.py), and belong to `InfersSizes` while units are away, or for good.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .standins import StandIn, restore, stand_in
from .tape.seen import plain

__all__ = ["InfersSizes", "alike", "infer_sizes", "inferring"]

VIEWS = (Tensor.view, Tensor.reshape, Tensor.view_as, Tensor.reshape_as)


class Inferring(TorchFunctionMode):
    """Inside, views are given −1 for the last of their sizes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs or func not in VIEWS or _is_empty(args[0]):
            return func(*args, **(kwargs or {}))
        x, *sizes = args
        if len(sizes) == 1 and isinstance(sizes[0], Tensor):
            return x.reshape(*sizes[0].shape[:-1], -1)
        sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
        told = sizes and not any(isinstance(n, torch.dtype) or (type(n) is int and n < 0) for n in sizes)
        return func(x, *sizes[:-1], -1) if told else func(*args)


class InfersSizes(StandIn):
    """A module whose own forward runs so."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with Inferring():
            return super().forward(*args, **kwargs)


def _is_empty(x: Tensor) -> bool:
    """Then nothing can be inferred; under torch.jit.trace numbers are tensors, and that is not asked."""
    tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return not tracing and plain(x.numel()) == 0


def alike(model: nn.Module, paths: Collection[str]) -> tuple[str, ...]:
    """All modules of the classes that these are of, but for those that do it already."""
    modules = dict(model.named_modules())
    kinds = {type(modules[path]) for path in paths}
    return tuple(path for path, m in modules.items() if type(m) in kinds and not isinstance(m, InfersSizes))


def infer_sizes(model: nn.Module, paths: Collection[str], *, away: bool) -> None:
    """These modules infer sizes while units are `away`."""
    for path in paths:
        (stand_in if away else restore)(model.get_submodule(path), InfersSizes)


@contextmanager
def inferring(model: nn.Module, paths: Collection[str]) -> Iterator[None]:
    """Inside, these modules do."""
    infer_sizes(model, paths, away=True)
    try:
        yield
    finally:
        infer_sizes(model, paths, away=False)
