"""Ctrl-C between two steps, never inside of one: what changes model and optimizer together is done whole.

An interrupt that arrives meanwhile is raised when the block is through; a second one at once (a collective
may wait for a rank that is gone). Outside of the main thread no signal arrives, and nothing is done. About
2 µs a block: the wrappers of the module `signal` would take ten times that.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import functools
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

__all__ = ["Uninterrupted", "uninterrupted"]

F = TypeVar("F", bound=Callable[..., Any])
SIGINT = int(signal.SIGINT)


class Uninterrupted:
    """SIGINT waits until the `with` block is through."""

    _before: Any
    _waiting: bool

    def __enter__(self) -> None:
        self._waiting = False
        before: Any = _signal.getsignal(SIGINT)
        main = threading.get_ident() == threading.main_thread().ident
        self._before = before if main and callable(before) else None
        if self._before is not None:
            _signal.signal(SIGINT, self._keep)

    def _keep(self, number: int, frame: FrameType | None) -> None:
        if self._waiting:
            self._waiting = False
            self._before(number, frame)
        self._waiting = True

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            _signal.signal(SIGINT, self._before)
            if self._waiting:
                signal.raise_signal(signal.SIGINT)


def uninterrupted(function: F) -> F:
    """The function, each call of it whole."""

    @functools.wraps(function)
    def whole(*args: Any, **kwargs: Any) -> Any:
        with Uninterrupted():
            return function(*args, **kwargs)

    return whole  # type: ignore[return-value]
