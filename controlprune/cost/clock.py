"""Seconds of a forward pass: medians of interleaved rounds, robust to a machine that others use too.

Candidates are timed in turn, A B C A B C …, each after an untimed run of its own (warm caches, as it will be
when it runs alone). With t_rk the time of candidate k in round r, a busy round slows all candidates alike::

    t_rk ≈ ρ_r β_k,    ρ_r = median_k(t_rk / m_k),  m_k = median_r t_rk,    β_k = median_r(t_rk / ρ_r)

and `spread` is half the interquartile range of t_rk / ρ_r over β_k. Forwards shorter than `SHORTEST` are run
several times per sample. The clock is wall time by default; on an accelerator it is read synchronised.

On a CPU the C library gives memory back to the system and takes it again, a page fault for every 4 KiB, as it
happens to find its heap: the same small CNN took 9 or 16 ms in one process. glibc keeps what fits into twice
the largest block that was ever freed, 32 MiB at most count; so one such block is freed first (`settle_heap`),
and what is timed is the model on memory that is at hand.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = [
    "Candidate",
    "Clock",
    "Run",
    "Timing",
    "device_clock",
    "measure",
    "measure_interleaved",
    "measure_latency",
    "settle_heap",
]

Clock: TypeAlias = Callable[[], float]
Run: TypeAlias = Callable[[], object]
Candidate: TypeAlias = Callable[[], AbstractContextManager[Run]]  # what to run, and all it needs around it
SHORTEST = 2e-3  # seconds of one sample
ROUNDS = (5, 100)  # at least, at most
BLOCK = 31 * 2**20  # bytes; from 32 MiB on glibc learns nothing from a block that is freed


@dataclass(frozen=True)
class Timing:
    """Median seconds of one run, and its relative spread (half the interquartile range over the median).

    `runs`: how many there were in all, untimed ones too.
    """

    median: float
    spread: float
    rounds: int
    runs: int


def device_clock(device: torch.device, clock: Clock = time.perf_counter) -> Clock:
    """`clock`, read when the device has done all that it was given."""
    if device.type == "cuda":
        return lambda: (torch.cuda.synchronize(device), clock())[1]
    if device.type == "mps":
        return lambda: (torch.mps.synchronize(), clock())[1]
    return clock


def settle_heap() -> None:
    """From here on glibc keeps up to 62 MiB of freed memory; other allocators do not mind."""
    torch.empty(BLOCK, dtype=torch.uint8)


def measure_latency(forward: Run, *, clock: Clock = time.perf_counter, seconds: float = 1.0) -> Timing:
    """Time one forward pass for about `seconds`."""
    return measure_interleaved([forward], clock=clock, seconds=seconds)[0]


def measure_interleaved(
    forwards: Sequence[Run], *, clock: Clock = time.perf_counter, seconds: float = 2.0
) -> list[Timing]:
    """Time several forward passes A B A B …, for about `seconds` in all."""
    return measure([_plain(forward) for forward in forwards], clock=clock, seconds=seconds)


def measure(
    candidates: Sequence[Candidate], *, clock: Clock = time.perf_counter, seconds: float = 2.0
) -> list[Timing]:
    """The same, each candidate inside its context (entered and left outside the timed part)."""
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"seconds={seconds!r}: give the time to measure for, a finite number > 0")
    settle_heap()
    for candidate in candidates:  # whatever is only done once
        _sample(candidate, 1, clock)
    first = [_sample(candidate, 1, clock) for candidate in candidates]
    repeats = [max(1, math.ceil(SHORTEST / max(t, 1e-7))) for t in first]
    round_time = sum(t * (n + 1) for t, n in zip(first, repeats, strict=True))
    rounds = int(np.clip(seconds / max(round_time, 1e-9), *ROUNDS))
    pairs = list(zip(candidates, repeats, strict=True))
    times = np.array([[_sample(candidate, n, clock) for candidate, n in pairs] for _ in range(rounds)])
    found = zip(robust(times), repeats, strict=True)
    return [Timing(median, spread, rounds, 4 + rounds * (1 + n)) for (median, spread), n in found]


def robust(times: NDArray[np.float64]) -> list[tuple[float, float]]:
    """(β_k, spread) of each column of `times` [rounds, candidates]."""
    slow = np.median(times / np.median(times, axis=0), axis=1, keepdims=True)
    evened = times / slow if times.shape[1] > 2 else times  # of one or two, the median is one of them
    middle = np.median(evened, axis=0)
    low, high = np.quantile(evened, [0.25, 0.75], axis=0)
    return [(float(m), float((h - lo) / (2 * m))) for m, lo, h in zip(middle, low, high, strict=True)]


def _plain(forward: Run) -> Candidate:
    return lambda: nullcontext(forward)


def _sample(candidate: Candidate, repeats: int, clock: Clock) -> float:
    with candidate() as run:
        run()
        began = clock()
        for _ in range(repeats):
            run()
        return (clock() - began) / repeats
