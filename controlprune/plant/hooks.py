"""Hooks that hold their owner weakly, and that a copy of the hooked object does not inherit.

`copy.deepcopy` and `pickle` copy a module's hooks with it. A `Link` becomes a function that does nothing
there, so that a copy of an attached model is a plain model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

__all__ = ["Link"]


class Link:
    """Calls `method(owner, …)` with the hook's own arguments, as long as the owner is there."""

    __slots__ = ("_from_public_api", "method", "owner")  # the first is set by torch

    def __init__(self, owner: object, method: Callable[..., Any]) -> None:
        self.owner, self.method = weakref.ref(owner), method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner = self.owner()
        return None if owner is None else self.method(owner, *args, **kwargs)

    def __deepcopy__(self, memo: object) -> Callable[..., None]:
        return _nothing

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _retired, ()


def _nothing(*args: object, **kwargs: object) -> None:
    """What a link becomes in a copy."""


def _retired() -> Callable[..., None]:
    return _nothing
