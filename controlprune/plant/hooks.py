"""Hooks that hold their owner weakly, and that a copy of the hooked object does not inherit.

`copy.deepcopy` and `pickle` copy a module's hooks with it. A `Link` becomes one that does nothing there, so
that a copy of an attached model is a plain model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

__all__ = ["Link"]


class Unscriptable(AttributeError):
    """What torch.jit.script is told, which asks each forward hook for its name; to others it has none."""


class Link:
    """Calls `method(owner, …)` with the hook's own arguments, as long as the owner is there."""

    __slots__ = ("_from_public_api", "method", "owner")  # the first is set by torch

    def __init__(self, owner: object | None, method: Callable[..., Any] | None) -> None:
        self.owner, self.method = _no_owner if owner is None else weakref.ref(owner), method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner = self.owner()
        return None if owner is None or self.method is None else self.method(owner, *args, **kwargs)

    def __deepcopy__(self, memo: object) -> Link:
        return _retired()

    def __reduce__(self) -> tuple[Callable[[], Link], tuple[()]]:
        return _retired, ()

    @property
    def __name__(self) -> str:
        raise Unscriptable(
            "controlprune: torch.jit.script cannot take a model that has units off but in its tensors, nor a "
            "copy of it; script it after finalize() or detach(), or trace it"
        )


def _no_owner() -> None:
    return None


def _retired() -> Link:
    return Link(None, None)
