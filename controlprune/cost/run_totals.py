"""Accounts of the run: what its steps have used so far, of FLOPs, time and joules.

    train_flops     Σ_steps 3 C_flops(n_t) / C_flops(N)      a forward and twice that backward, counted
                    + forwards beside the training / 3       on the layout that ran (masks alone save nothing)
    train_time      what the clock says since attach         data loading and the controller itself included
    train_energy    what the meter says since attach

A fraction is of `total_steps` dense steps. What one takes is the median over the steps that ran dense
(at least `ENOUGH` of them where the plan leaves as many), less what the controller itself took of them; where
none ran dense, that of the layout that ran over what its model says. A limit in seconds, joules or FLOP is
turned into a fraction by it.

A single interval of more than `JUMP` medians, or a negative one, is a clock that jumped or a machine that
slept, not training: it is left out of both and counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

from ..budget import Target
from .energy_meter import Counter
from .instruments import Instruments
from .measurement import Measurement

__all__ = ["Accounts"]

ENOUGH = 50  # dense intervals that are kept for the median
JUMP = 100.0
ENERGY, TIME, FLOPS = "train_energy", "train_time", "train_flops"


class Accounts:
    """Counts steps; read at every update. `targets`: the run totals under budget."""

    def __init__(
        self,
        targets: Mapping[str, Target],
        total_steps: int,
        dense_flops: float,
        instruments: Instruments,
    ) -> None:
        self.targets = dict(targets)
        self.jumps = 0
        self._steps, self._flops = total_steps, dense_flops
        self._clock, self._meter = instruments.clock, instruments.energy
        self._counter = Counter(wraps_at=self._meter.wraps_at if self._meter is not None else None)
        self._metered_at = self._clock()
        self._counts = 0.0  # FLOPs so far, in dense steps
        self._elapsed = 0.0
        self._last = self._clock() if TIME in self.targets else math.nan
        self._window: list[float] = []  # intervals since the layout changed or the last reading
        self._dense: list[float] = []  # intervals that ran dense
        self._step_seconds = math.nan  # of a dense step
        self._joules = 0.0
        self._joules_read = 0.0  # at the last reading
        self._steps_read = 0
        self._done = 0
        self._step_joules = math.nan
        if ENERGY in self.targets:
            self._read_meter()

    @property
    def timed(self) -> bool:
        """Is the time of every step counted?"""
        return TIME in self.targets

    def retarget(self, targets: Mapping[str, Target], total_steps: int) -> None:
        """Other limits and horizon from here on; ValueError for time or energy not counted from the start."""
        new = [name for name in targets if name not in self.targets and name != FLOPS]
        if new:
            raise ValueError(
                f"budget: {', '.join(new)} must be under budget from the start; what the run has used of "
                "it is not known"
            )
        self.targets, self._steps = dict(targets), total_steps

    def step(self, use: float, own: float = 0.0) -> None:
        """A step is over: `use` of the dense FLOPs, `own` seconds of it in the controller."""
        self._done += 1
        self._counts += use
        if TIME not in self.targets:
            return
        now = self._clock()
        passed, self._last = now - self._last, now
        known = self._window or self._dense
        if passed < 0 or (len(known) >= 5 and passed > JUMP * median(known)):
            self.jumps += 1
            return
        self._elapsed += passed
        if self._done == 1:
            return  # the first one warms up, and began at attach
        self._window.append(passed)
        if use == 1.0 and len(self._dense) < ENOUGH:
            self._dense.append(max(passed - own, 0.0))

    def beside(self, forwards: float) -> None:
        """Forward passes of dense cost that were not training (timings)."""
        self._counts += forwards / 3.0

    def laid_out(self) -> None:
        """The tensors changed their shapes: what was measured before tells nothing of now."""
        self._window.clear()
        if ENERGY in self.targets:
            self._read_meter()
            self._joules_read, self._steps_read = self._joules, self._done

    def read(self, modelled: Mapping[str, float], widths: tuple[int, ...]) -> list[Measurement]:
        """All totals now; `modelled`: what the models say of a step in the layout of these widths."""
        found = []
        if FLOPS in self.targets:
            limit = self._limit(FLOPS, self._flops)
            found.append(Measurement(FLOPS, widths, math.nan, 0.0, self._counts / self._steps, limit))
        if TIME in self.targets and (account := self._time(modelled[TIME], widths)):
            found.append(account)
        if ENERGY in self.targets and (account := self._energy(modelled[ENERGY], widths)):
            found.append(account)
        return found

    def used(self) -> dict[str, float]:
        """In FLOP, seconds and joules."""
        use = {FLOPS: self._counts * self._flops, TIME: self._elapsed, ENERGY: self._joules}
        return {name: use[name] for name in self.targets}

    def dense(self) -> dict[str, float]:
        """What a whole dense run would take, in the same units; nan while it is not known."""
        one = {FLOPS: self._flops, TIME: self._step_seconds, ENERGY: self._step_joules}
        return {name: one[name] * self._steps for name in self.targets}

    def _limit(self, resource: str, dense_step: float) -> float:
        whole = dense_step * self._steps
        return self.targets[resource].limit(whole) / whole

    def _time(self, modelled: float, widths: tuple[int, ...]) -> Measurement | None:
        if self._dense:
            self._step_seconds = median(self._dense)
        elif self._window and math.isnan(self._step_seconds):
            self._step_seconds = median(self._window) / modelled
        if math.isnan(self._step_seconds):
            return None
        step, spread = math.nan, 1.0
        if len(self._window) >= 3:
            mean = sum(self._window) / len(self._window)
            deviation = math.sqrt(sum((x - mean) ** 2 for x in self._window) / (len(self._window) - 1))
            step, spread = mean / self._step_seconds, deviation / mean / math.sqrt(len(self._window))
            self._window.clear()
        spent = self._elapsed / (self._step_seconds * self._steps)
        return Measurement(TIME, widths, step, spread, spent, self._limit(TIME, self._step_seconds))

    def _energy(self, modelled: float, widths: tuple[int, ...]) -> Measurement | None:
        self._read_meter()
        steps, joules = self._done - self._steps_read, self._joules - self._joules_read
        if steps < 3 or joules <= 0:
            return None
        self._joules_read, self._steps_read = self._joules, self._done
        if math.isnan(self._step_joules) or (modelled >= 1.0 and self._done <= ENOUGH):
            whole = self._joules / self._done if modelled >= 1.0 else joules / steps / modelled
            self._step_joules = whole
        spent = self._joules / (self._step_joules * self._steps)
        step = joules / steps / self._step_joules
        limit = self._limit(ENERGY, self._step_joules)
        return Measurement(ENERGY, widths, step, 0.3 / math.sqrt(steps), spent, limit)

    def _read_meter(self) -> None:
        assert self._meter is not None
        now = self._clock()
        self._counter, joules = self._counter.update(self._meter.joules(), max(now - self._metered_at, 0.0))
        self._metered_at = now
        self._joules += joules

    def state_dict(self) -> dict[str, Any]:
        return {
            "counts": self._counts,
            "elapsed": self._elapsed,
            "joules": self._joules,
            "done": self._done,
            "dense": list(self._dense),
            "step_seconds": self._step_seconds,
            "step_joules": self._step_joules,
            "jumps": self.jumps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What was spent before counts; what passed between the save and now does not."""
        for name in ("counts", "elapsed", "joules", "done", "jumps"):
            if not 0.0 <= float(state[name]) < math.inf:
                raise ValueError(f"accounts: {name}={state[name]!r} is no amount")
        self._counts, self._elapsed = float(state["counts"]), float(state["elapsed"])
        self._done, self.jumps = int(state["done"]), int(state["jumps"])
        self._dense = [float(x) for x in state["dense"]]
        self._step_seconds, self._step_joules = float(state["step_seconds"]), float(state["step_joules"])
        self._window.clear()
        self._last = self._clock() if TIME in self.targets else math.nan
        self._counter = Counter(wraps_at=self._meter.wraps_at if self._meter is not None else None)
        self._metered_at = self._clock()
        self._joules = self._joules_read = float(state["joules"])
        self._steps_read = self._done
        if ENERGY in self.targets:
            self._read_meter()
