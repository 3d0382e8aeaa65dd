"""Medians on a clock that the test turns itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from controlprune.cost.clock import SHORTEST, measure_interleaved, measure_latency, robust


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def takes(self, name: str, seconds: Callable[[], float]) -> Callable[[], None]:
        def run() -> None:
            self.order.append(name)
            self.now += seconds()

        return run


def test_exact_on_a_quiet_machine() -> None:
    clock = Clock()
    timing = measure_latency(clock.takes("a", lambda: 0.125), clock=clock, seconds=4.0)
    assert (timing.median, timing.spread) == (0.125, 0.0)
    assert timing.rounds == 16
    assert timing.runs == len(clock.order)


def test_in_turn_each_after_a_run_of_its_own() -> None:
    clock = Clock()
    runs = [clock.takes(name, lambda: 0.5) for name in "ab"]
    measure_interleaved(runs, clock=clock, seconds=10.0)
    assert "".join(clock.order[8:16]) == "aabbaabb"


def test_short_runs_are_repeated() -> None:
    clock = Clock()
    seconds = SHORTEST / 8
    timing = measure_latency(clock.takes("a", lambda: seconds), clock=clock, seconds=0.1)
    assert timing.median == pytest.approx(seconds)
    assert len(clock.order) > 8 * timing.rounds


def test_busy_rounds_do_not_matter() -> None:
    """Nine candidates, two rounds in five three times as slow: the times are those of a quiet machine."""
    clock = Clock()
    turns = itertools.count()
    quiet = np.linspace(0.1, 0.9, 9)

    def busy() -> float:
        return 3.0 if (next(turns) // 18) % 5 in (1, 2) else 1.0

    runs = [clock.takes(str(k), lambda t=t: t * busy()) for k, t in enumerate(quiet)]
    timings = measure_interleaved(runs, clock=clock, seconds=300.0)
    assert [t.median for t in timings] == pytest.approx(quiet)
    assert max(t.spread for t in timings) < 1e-12


def test_robust_against_single_spikes() -> None:
    times = np.full((11, 4), 2.0)
    times[3, 1] = times[7, 2] = 500.0
    assert robust(times) == [(2.0, 0.0)] * 4


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_duration(seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds="):
        measure_latency(lambda: None, seconds=seconds)
