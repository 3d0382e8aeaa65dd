"""The package computes alike wherever the user calls it: its own tensors are plain ones of the host.

    inference_mode                       off inside: what is made is trained on, or written again
    a default device (torch.device(…))   the host's; every tensor that goes elsewhere says so
    autocast                             off, and its cache with it: it knows weights by their address

The user's own code, which `attach` runs, finds the default device and autocast that the user set; only the
cache stays off, as weights change between two forwards there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

__all__ = ["as_found", "plainly"]

F = TypeVar("F", bound=Callable[..., Any])
HOST = torch.device("cpu")


@dataclass(frozen=True)
class Found:
    """What the user had set where the package was called."""

    device: torch.device
    autocast: tuple[tuple[str, torch.dtype], ...]  # device types for which it is on


_outside: list[Found] = []  # innermost last


def plainly(function: F) -> F:
    """The function, each call of it in plain surroundings. Where they are plain it costs a microsecond."""

    @functools.wraps(function)
    def plain(*args: Any, **kwargs: Any) -> Any:
        if not _set_by_user():
            return function(*args, **kwargs)
        with _plain():
            return function(*args, **kwargs)

    return plain  # type: ignore[return-value]


@contextmanager
def as_found() -> Iterator[None]:
    """Inside `plainly`, for the user's own code: as the user had it, but for the cache of autocast."""
    if not _outside:
        yield
        return
    with ExitStack() as stack:
        found = _outside[-1]
        stack.enter_context(torch.device(found.device))
        for kind, dtype in found.autocast:
            stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
        yield


def _set_by_user() -> bool:
    return bool(
        torch.is_inference_mode_enabled()
        or torch._C._is_any_autocast_enabled()
        or torch._C._len_torch_function_stack()
    )


@contextmanager
def _plain() -> Iterator[None]:
    kinds = [k for k in _kinds() if torch.is_autocast_enabled(k)]
    autocast = tuple((k, torch.get_autocast_dtype(k)) for k in kinds)
    with ExitStack() as stack:
        _outside.append(Found(torch.get_default_device(), autocast))
        stack.callback(_outside.pop)
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))  # which enables gradients, too
        if _outside[-1].device != HOST:
            stack.enter_context(HOST)
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _kinds() -> list[str]:
    accelerator = torch.accelerator.current_accelerator()
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]
