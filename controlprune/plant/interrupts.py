"""Signals between two steps, never inside of one: what changes model and optimizer together is done whole.

A handler of the user's may raise (Ctrl-C, a time limit by SIGALRM, SIGTERM of a job scheduler). One that is
called meanwhile waits until the block is through; only a second Ctrl-C is raised at once (a collective may
wait for a rank that is gone). Outside of the main thread no signal arrives, and nothing is done. About 5 µs a
block: the wrappers of the module `signal` would take ten times that.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import functools
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, ClassVar, TypeVar

__all__ = ["Uninterrupted", "uninterrupted"]

F = TypeVar("F", bound=Callable[..., Any])
SIGINT = int(signal.SIGINT)
CAUGHT = tuple(sorted({int(s) for s in signal.Signals} & {int(s) for s in signal.valid_signals()}))


class Uninterrupted:
    """Handlers written in Python wait until the (outermost) `with` block is through."""

    busy: ClassVar[bool] = False  # in the main thread

    def __enter__(self) -> None:
        self._before: dict[int, Any] = {}
        self._waiting: list[int] = []
        self._outermost = not Uninterrupted.busy and threading.get_ident() == threading.main_thread().ident
        if self._outermost:
            try:
                for number in CAUGHT:
                    handler: Any = _signal.getsignal(number)
                    if callable(handler):
                        self._before[number] = handler
                        _signal.signal(number, self._keep)
                Uninterrupted.busy = True
            except BaseException:
                self._put_back()
                raise

    def _keep(self, number: int, frame: FrameType | None) -> None:
        if number not in self._waiting:
            self._waiting.append(number)
        elif number == SIGINT:
            self._waiting.remove(number)
            self._before[number](number, frame)

    def __exit__(self, *error: object) -> None:
        if self._outermost:
            Uninterrupted.busy = False
            try:
                self._put_back()
            finally:
                _deliver(self._waiting)

    def _put_back(self) -> None:
        """Every handler, whatever those that are in place again raise meanwhile."""
        raised = None
        while self._before:
            try:
                number, handler = next(iter(self._before.items()))
                _signal.signal(number, handler)
                del self._before[number]
            except BaseException as error:
                raised = error
        if raised is not None:
            raise raised


def _deliver(numbers: list[int]) -> None:
    if numbers:
        try:
            signal.raise_signal(numbers[0])
        finally:
            _deliver(numbers[1:])


def uninterrupted(function: F) -> F:
    """The function, each call of it whole."""

    @functools.wraps(function)
    def whole(*args: Any, **kwargs: Any) -> Any:
        with Uninterrupted():
            return function(*args, **kwargs)

    return whole  # type: ignore[return-value]
