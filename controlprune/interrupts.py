"""Ctrl-C between two steps, never inside of one: what changes model and optimizer together is done whole.

An interrupt that arrives meanwhile is raised when the block is through; a second one at once (a collective
may wait for a rank that is gone). Outside of the main thread no signal arrives, and nothing is done.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["uninterrupted"]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """SIGINT waits until the block, or the decorated function, is through."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    waiting = False

    def keep(number: int, frame: FrameType | None) -> None:
        nonlocal waiting
        if waiting:
            waiting = False
            before(number, frame)
        waiting = True

    signal.signal(signal.SIGINT, keep)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if waiting:
            signal.raise_signal(signal.SIGINT)
