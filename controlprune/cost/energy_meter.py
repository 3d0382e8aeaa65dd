"""Meters: cumulative joules, what they are worth, and increments that can be trusted.

A `Meter` tells joules so far, from an arbitrary zero. Measured ones are counters of the hardware, read
through zeus (`pip install controlprune[energy]`): NVML's for NVIDIA GPUs, RAPL's for CPU packages and their
memory. Both count the whole device, idle power and other people's work included. zeus and not codecarbon,
since it gives the raw counter of one device and an error where there is none; codecarbon runs a tracker
thread and falls back to tables of typical power where it finds no counter. Without one, `Wattage` multiplies
time by a power that the user states: an estimate, and named so.

Raw readings reset, wrap around, repeat and fail. `Counter` makes increments of them (pure: state in, state
and increment out)::

    reading    not finite, negative                        0; what was missed comes with the next good one
               falls from the upper to the lower half
                 of the range `wraps_at`                   reading + wraps_at − last
               falls to less than half of the last         reset: mean power so far × time since
               falls by less                               0, the last stays (noise)
               rises by more than most_watts × time        a jump: mean power so far × time since
    otherwise                                              reading − last
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from .clock import Clock

__all__ = [
    "Counter",
    "HardwareMeter",
    "Meter",
    "NoMeter",
    "Source",
    "Wattage",
    "choose_meter",
    "hardware_meter",
]


class NoMeter(ValueError):
    """Energy is asked for where nothing can be metered and no wattage is stated."""


class Meter(Protocol):
    """Joules so far, from an arbitrary zero."""

    @property
    def name(self) -> str:
        """What it reads, for people."""
        ...

    @property
    def measured(self) -> bool:
        """A counter of the hardware; otherwise an estimate."""
        ...

    @property
    def includes_idle(self) -> bool: ...

    @property
    def wraps_at(self) -> float | None:
        """The reading at which it starts from zero again, if it does."""
        ...

    def joules(self) -> float: ...


@dataclass(frozen=True)
class Counter:
    """Increments from raw readings; see the module. Start with `Counter(wraps_at=meter.wraps_at)`."""

    wraps_at: float | None = None
    most_watts: float = math.inf
    last: float | None = None
    pending: float = 0.0  # seconds since `last` was read
    total: float = 0.0  # joules in all increments
    seconds: float = 0.0  # that readings which were neither a reset nor a jump have covered
    seen: float = 0.0  # joules in them

    def update(self, reading: float, elapsed: float) -> tuple[Counter, float]:
        """(the counter, joules since the last call), `elapsed` seconds after it."""
        if not (math.isfinite(elapsed) and elapsed >= 0):
            raise ValueError(f"elapsed={elapsed!r}: give the seconds since the last reading, >= 0")
        pending = self.pending + elapsed
        if not math.isfinite(reading) or reading < 0:
            return replace(self, pending=pending), 0.0
        if self.last is None:
            return replace(self, last=reading, pending=0.0), 0.0
        step = reading - self.last
        half = math.inf if self.wraps_at is None else self.wraps_at / 2
        if self.wraps_at is not None and reading < half < self.last:
            step += self.wraps_at
        elif step < 0 and reading >= self.last / 2:
            return replace(self, pending=pending), 0.0
        if step < 0 or step > self.most_watts * pending:
            step = pending * (self.seen / self.seconds if self.seconds else 0.0)
            return replace(self, last=reading, pending=0.0, total=self.total + step), step
        return replace(
            self,
            last=reading,
            pending=0.0,
            total=self.total + step,
            seconds=self.seconds + pending,
            seen=self.seen + step,
        ), step


class Wattage:
    """A stated power times elapsed time: an estimate."""

    measured, wraps_at = False, None

    def __init__(self, watts: float, *, includes_idle: bool = True, clock: Clock = time.perf_counter) -> None:
        """`clock`: `time.process_time` counts only while this process computes, once per busy core."""
        if isinstance(watts, bool) or not (math.isfinite(watts) and watts > 0):
            raise ValueError(f"Wattage(watts={watts!r}): give the power drawn in watts, a finite number > 0")
        self.watts, self.includes_idle = float(watts), includes_idle
        self._clock, self._began = clock, clock()

    @property
    def name(self) -> str:
        return f"{self.watts:g} W as stated × time"

    def joules(self) -> float:
        return self.watts * (self._clock() - self._began)


@dataclass(frozen=True)
class Source:
    """One raw counter in joules, and the value at which it starts again."""

    read: Callable[[], float]
    wraps_at: float | None = None


class HardwareMeter:
    """The sum of one or more raw counters, each followed over its own wrap-arounds."""

    measured, includes_idle, wraps_at = True, True, None

    def __init__(self, name: str, sources: Sequence[Source], clock: Clock = time.perf_counter) -> None:
        self.name, self._sources, self._clock = name, tuple(sources), clock
        self._counters = [Counter(wraps_at=source.wraps_at) for source in sources]
        self._read_at = clock()
        self.joules()

    def joules(self) -> float:
        now = self._clock()
        elapsed, self._read_at = now - self._read_at, now
        pairs = zip(self._sources, self._counters, strict=True)
        self._counters = [counter.update(source.read(), elapsed)[0] for source, counter in pairs]
        return sum(counter.total for counter in self._counters)


def choose_meter(device: torch.device, given: Meter | None = None) -> Meter:
    """The user's meter, else the hardware's of `device`, else `NoMeter` with what to do."""
    if given is not None:
        if not callable(getattr(given, "joules", None)):
            raise TypeError(f"meter={given!r}: give a meter such as controlprune.Wattage(65)")
        return given
    try:
        return hardware_meter(device)
    except NoMeter as error:
        raise NoMeter(
            f"energy: nothing can be metered on {device} ({error}); state the power drawn, "
            "instruments=Instruments(energy=Wattage(65)), or leave energy out of the budget"
        ) from error


def hardware_meter(device: torch.device) -> Meter:
    """NVML's counter of a GPU, or RAPL's of the CPU packages; `NoMeter` says why there is none."""
    try:
        devices = importlib.import_module("zeus.device")
        failure: type[Exception] = importlib.import_module("zeus.exception").ZeusBaseError
    except ImportError as error:
        raise NoMeter("zeus is not installed: pip install controlprune[energy]") from error
    try:
        meter = _gpu(devices, device) if device.type == "cuda" else _cpu(devices)
    except (failure, OSError) as error:
        raise NoMeter(str(error)) from error
    if not _counts(meter):
        raise NoMeter(f"the counter of {meter.name} does not move")
    return meter


def _gpu(devices: Any, device: torch.device) -> HardwareMeter:
    gpus = devices.get_gpus()
    number = torch.cuda.current_device() if device.index is None else device.index
    if not gpus.supports_get_total_energy_consumption(number):
        raise NoMeter(f"GPU {number} has no energy counter")
    source = Source(lambda: gpus.get_total_energy_consumption(number) / 1e3)  # from mJ
    return HardwareMeter(f"NVML, GPU {number}", [source])


def _cpu(devices: Any) -> HardwareMeter:
    """All packages and their memory. A counter's file is read here: zeus would start a process for each."""
    sources: list[Source] = []
    cpus = devices.get_cpus().cpus
    for cpu in cpus:
        files = [file for file in (getattr(cpu, "rapl_file", None), getattr(cpu, "dram", None)) if file]
        sources += [Source(_microjoules(Path(f.energy_uj_path)), f.max_energy_range_uj / 1e6) for f in files]
        if not files:  # zeus's daemon reads for us
            sources.append(Source(_daemon(cpu)))
    return HardwareMeter(f"RAPL, {len(cpus)} CPU packages with memory", sources)


def _microjoules(file: Path) -> Callable[[], float]:
    return lambda: float(file.read_text()) / 1e6


def _daemon(cpu: Any) -> Callable[[], float]:
    def read() -> float:
        told = cpu.get_total_energy_consumption()
        return (told.cpu_mj + (told.dram_mj or 0.0)) / 1e3

    return read


def _counts(meter: Meter, seconds: float = 0.3) -> bool:
    """Does it rise? Virtual machines show counters that stand still."""
    began, first = time.perf_counter(), meter.joules()
    while time.perf_counter() - began < seconds:
        if meter.joules() > first:
            return True
    return False
