"""Joules of one forward pass, as a polynomial in the widths: power times latency.

    E(n) = P · T(n),    P = joules / seconds of forwards repeated on the meter, or the wattage as stated

The power is taken as that of the dense model at every width; what that leaves over, the loop corrects.
`measured` and `by` say where the figure comes from, `includes_idle` whether what the device draws at rest
is part of it (hardware counters: it is). Units: joules.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from .clock import Clock
from .energy_meter import Counter, Meter, NoMeter, Wattage
from .polynomial import Polynomial

__all__ = ["Energy", "energy", "power"]


@dataclass(frozen=True)
class Energy:
    """`joules` over the widths, at `watts`; `measured` by the meter called `by`, or estimated."""

    joules: Polynomial
    watts: float
    measured: bool
    by: str
    includes_idle: bool


def energy(
    latency: Polynomial,
    meter: Meter,
    forward: Callable[[], object],
    *,
    seconds: float = 3.0,
    clock: Clock = time.perf_counter,
) -> Energy:
    """Joules per forward from `latency` (seconds per forward) and the power while `forward` runs."""
    watts = meter.watts if isinstance(meter, Wattage) else power(meter, forward, seconds=seconds, clock=clock)
    return Energy(watts * latency, watts, meter.measured, meter.name, meter.includes_idle)


def power(
    meter: Meter,
    forward: Callable[[], object],
    *,
    seconds: float = 3.0,
    clock: Clock = time.perf_counter,
) -> float:
    """Mean watts while `forward` runs again and again for about `seconds`.

    On an accelerator, give a `forward` that waits for it (cost/clock.py: `device_clock` does).
    """
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"seconds={seconds!r}: give the time to measure for, a finite number > 0")
    forward()
    began = last = clock()
    counter, _ = Counter(wraps_at=meter.wraps_at).update(meter.joules(), 0.0)
    while last - began < seconds:
        forward()
        now = clock()
        counter, _ = counter.update(meter.joules(), now - last)
        last = now
    if not counter.total > 0:
        raise NoMeter(f"energy: {meter.name} has counted nothing in {last - began:.1f} s; state a Wattage")
    return counter.total / (last - began - counter.pending)
