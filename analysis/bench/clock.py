"""Process CPU time of a run on a machine that has other work, and a small product to measure it by.

`kernel` is the median time of one fixed matrix product, taken now and then during the run: seconds / kernel
is a time in units of the machine as it was just then, and ratios of those are what the tables show.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch

__all__ = ["Clock"]


class Clock:
    """`seconds` counts while it runs, and not inside `paused()`."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began: float | None = None
        self._kernels: list[float] = []
        generator = torch.Generator().manual_seed(0)
        self._a, self._b = (torch.randn(384, 384, generator=generator) for _ in range(2))

    def start(self) -> None:
        self._began = time.process_time()

    def stop(self) -> None:
        if self._began is not None:
            self.seconds += time.process_time() - self._began
            self._began = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        running = self._began is not None
        self.stop()
        try:
            yield
        finally:
            if running:
                self.start()

    def compare(self, products: int = 5) -> None:
        """Time the kernel, off the clock."""
        with self.paused():
            for _ in range(products):
                began = time.process_time()
                torch.mm(self._a, self._b)
                self._kernels.append(time.process_time() - began)

    @property
    def kernel(self) -> float:
        return median(self._kernels)
