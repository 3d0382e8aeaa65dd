"""A meter with every fault that real ones were seen to have, for tests and studies."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable

import numpy as np

__all__ = ["SimulatedMeter"]


class SimulatedMeter:
    """A meter with the faults of real ones, for tests: the same seed gives the same readings.

    `watts()` is the true power at the present `clock()`; between two readings it is taken as constant.
    `true` is the energy that was really drawn.

        period, delay   the counter moves every `period` seconds, and shows what was true `delay` ago
        drift, noise    a gain of 1 + drift × seconds; Gaussian, in joules, on each reading
        reset_every     it starts from zero again after so many seconds
        wraps_at        it starts from zero again at so many joules
        missing         the share of readings that are NaN
    """

    measured, includes_idle, name = True, True, "simulated"

    def __init__(
        self,
        watts: Callable[[], float],
        clock: Callable[[], float],
        *,
        period: float = 0.0,
        delay: float = 0.0,
        drift: float = 0.0,
        noise: float = 0.0,
        reset_every: float = math.inf,
        wraps_at: float | None = None,
        missing: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._watts, self._clock = watts, clock
        self.period, self.delay, self.drift, self.noise = period, delay, drift, noise
        self.reset_every, self.wraps_at, self.missing = reset_every, wraps_at, missing
        self._random = np.random.default_rng(seed)
        self._times, self._energies = [clock()], [0.0]

    @property
    def true(self) -> float:
        now, last = self._clock(), self._times[-1]
        if now > last:
            self._times.append(now)
            self._energies.append(self._energies[-1] + self._watts() * (now - last))
        return self._energies[-1]

    def joules(self) -> float:
        _ = self.true
        missing, noise = self._random.random() < self.missing, self._random.normal() * self.noise
        now = self._clock() - self.delay
        shown = now - now % self.period if self.period else now
        since = shown - (shown - self._times[0]) % self.reset_every
        reading = self._shown(shown) - (self._shown(since) if since > self._times[0] else 0.0)
        reading = max(reading + noise, 0.0)
        if missing:
            return math.nan
        return reading if self.wraps_at is None else reading % self.wraps_at

    def _shown(self, at: float) -> float:
        """What a counter without faults but for drift has at a time: ∫ P (1 + drift t) dt."""
        end = bisect_right(self._times, at)
        times = np.array([*self._times[:end], max(at, self._times[0])])
        energies = np.interp(times, self._times, self._energies)
        gains = 1.0 + self.drift * ((times[1:] + times[:-1]) / 2 - self._times[0])
        return float(np.diff(energies) @ gains)
