"""Counters against every fault a meter can have, stated power, and who is chosen to meter."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_meter import SimulatedMeter

from controlprune.cost.energy import energy, power
from controlprune.cost.energy_meter import (
    Counter,
    HardwareMeter,
    NoMeter,
    Source,
    Wattage,
    choose_meter,
    hardware_meter,
)
from controlprune.cost.polynomial import Polynomial
from controlprune.structure.extents import Units

CPU = torch.device("cpu")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(counter: Counter, readings: list[float], elapsed: float = 1.0) -> list[float]:
    found = []
    for reading in readings:
        counter, step = counter.update(reading, elapsed)
        found.append(step)
    return found


@pytest.mark.parametrize(
    ("readings", "steps"),
    [
        ([50, 60, 75], [0, 10, 15]),
        ([50, 50, 70], [0, 0, 20]),  # stale
        ([50, math.nan, -1, math.inf, 90], [0, 0, 0, 0, 40]),  # missed, then caught up
        ([50, 60, 59, 70], [0, 10, 0, 10]),  # noise
        ([50, 60, 2, 12], [0, 10, 10, 10]),  # a reset: as much as in a second before
        ([50, 2, 12], [0, 0, 10]),  # a reset before anything is known
    ],
)
def test_increments(readings: list[float], steps: list[float]) -> None:
    assert run(Counter(), readings) == steps


def test_wrap_around_is_exact() -> None:
    assert run(Counter(wraps_at=100.0), [90, 98, 6, 50]) == [0, 8, 8, 44]


def test_a_jump_is_no_energy() -> None:
    assert run(Counter(most_watts=100.0), [50, 60, 9e9, 9e9 + 10]) == [0, 10, 10, 10]


def test_a_counter_refuses_time_that_runs_backwards() -> None:
    with pytest.raises(ValueError, match="elapsed="):
        Counter().update(1.0, -1.0)


def follow(meter: SimulatedMeter, clock: Clock, seconds: float, every: float = 0.1) -> float:
    """Joules that a counter makes of a meter's readings, relative to the truth."""
    counter, _ = Counter(wraps_at=meter.wraps_at, most_watts=1000.0).update(meter.joules(), 0.0)
    for _ in range(int(seconds / every)):
        clock.now += every
        counter, _ = counter.update(meter.joules(), every)
    return counter.total / meter.true


@pytest.mark.parametrize(
    ("faults", "within"),
    [
        ({}, 1e-9),
        ({"wraps_at": 50.0}, 1e-9),
        ({"missing": 0.3}, 0.02),
        ({"period": 0.25}, 0.01),
        ({"delay": 0.5}, 0.01),
        ({"noise": 0.5}, 0.01),
        ({"reset_every": 7.0}, 0.03),
        ({"drift": 1e-4}, 0.01),
        (
            {"noise": 0.5, "missing": 0.1, "delay": 0.5, "reset_every": 17.0, "period": 0.2, "drift": 1e-4},
            0.05,
        ),
        ({"noise": 0.1, "missing": 0.1, "delay": 0.5, "wraps_at": 300.0, "period": 0.2}, 0.05),
    ],
)
def test_a_faulty_meter_is_followed(faults: dict[str, float], within: float) -> None:
    clock = Clock()
    meter = SimulatedMeter(lambda: 60.0 + 30.0 * math.sin(clock.now), clock, **faults)  # type: ignore[arg-type]
    assert follow(meter, clock, 120.0) == pytest.approx(1.0, abs=within)


def test_the_simulated_meter_has_the_faults_it_is_given() -> None:
    def readings(**faults: Any) -> list[float]:
        clock = Clock()
        meter = SimulatedMeter(lambda: 10.0, clock, **faults)
        found = []
        for _ in range(8):
            clock.now += 1.0
            found.append(meter.joules())
        return found

    assert readings() == pytest.approx([10, 20, 30, 40, 50, 60, 70, 80])
    assert readings(delay=2.0) == pytest.approx([0, 0, 10, 20, 30, 40, 50, 60])
    assert readings(period=4.0) == pytest.approx([0, 0, 0, 40, 40, 40, 40, 80])
    assert readings(wraps_at=35.0) == pytest.approx([10, 20, 30, 5, 15, 25, 0, 10])
    assert readings(reset_every=3.0) == pytest.approx([10, 20, 0, 10, 20, 0, 10, 20])
    assert readings(drift=0.1)[-1] == pytest.approx(10 * (8 + 0.1 * 32))
    assert all(map(math.isnan, readings(missing=1.0)))
    assert readings(noise=1.0, seed=3) == readings(noise=1.0, seed=3) != readings(noise=1.0, seed=4)


def test_wattage_is_an_estimate() -> None:
    clock = Clock()
    meter = Wattage(65, clock=clock)
    clock.now += 4.0
    assert meter.joules() == 260.0
    assert not meter.measured
    assert meter.name == "65 W as stated × time"
    for watts in (0, -3, math.nan, math.inf, True):
        with pytest.raises(ValueError, match="watts="):
            Wattage(watts)


def test_hardware_counters_are_added_each_over_its_own_wraps() -> None:
    clock, first, second = Clock(), [0.0], [0.0]
    meter = HardwareMeter(
        "two", [Source(lambda: first[0] % 100, 100.0), Source(lambda: second[0] % 70, 70.0)], clock
    )
    for _ in range(20):
        clock.now += 1.0
        first[0] += 30.0
        second[0] += 20.0
        total = meter.joules()
    assert total == pytest.approx(20 * 50.0)


def fake_zeus(monkeypatch: pytest.MonkeyPatch, **devices: Any) -> None:
    failure = type("ZeusBaseError", (Exception,), {})
    for name, content in (
        ("zeus", {}),
        ("zeus.exception", {"ZeusBaseError": failure}),
        ("zeus.device", devices),
    ):
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


def test_rapl_is_read_from_its_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class File(types.SimpleNamespace):
        def rises(self, joules: float) -> None:
            self.energy_uj_path.write_text(f"{(self.start + joules) * 1e6:.0f}\n")

    package, memory = (
        File(energy_uj_path=tmp_path / n, max_energy_range_uj=1e9, start=s) for n, s in (("p", 5), ("d", 9))
    )
    reads = []

    def moving(self: Path, *_: Any) -> str:
        reads.append(self)
        return f"{(5 + 0.25 * len(reads)) * 1e6:.0f}\n"

    package.rises(0)
    memory.rises(0)
    cpus = types.SimpleNamespace(cpus=[types.SimpleNamespace(rapl_file=package, dram=memory)])
    fake_zeus(monkeypatch, get_cpus=lambda: cpus)
    with pytest.raises(NoMeter, match="does not move"):
        hardware_meter(CPU)
    with monkeypatch.context() as while_chosen:
        while_chosen.setattr(Path, "read_text", moving)
        meter = hardware_meter(CPU)
    assert meter.measured
    assert meter.includes_idle
    assert meter.name == "RAPL, 1 CPU packages with memory"


def test_nvml_counts_millijoules(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = iter(range(1000, 10**9, 500))
    gpus = types.SimpleNamespace(
        supports_get_total_energy_consumption=lambda number: number == 1,
        get_total_energy_consumption=lambda number: next(counter),
    )
    fake_zeus(monkeypatch, get_gpus=lambda: gpus)
    meter = hardware_meter(torch.device("cuda", 1))
    before = meter.joules()
    assert meter.joules() - before == pytest.approx(0.5)
    with pytest.raises(NoMeter, match="GPU 0 has no energy counter"):
        hardware_meter(torch.device("cuda", 0))


def test_without_a_meter_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zeus.device", None)
    with pytest.raises(NoMeter, match=r"energy: nothing can be metered on cpu .*pip install.*Wattage"):
        choose_meter(CPU)
    stated = Wattage(65)
    assert choose_meter(CPU, stated) is stated
    with pytest.raises(TypeError, match="meter='65 W'"):
        choose_meter(CPU, "65 W")  # type: ignore[arg-type]


def latency() -> Polynomial:
    """A hundredth of a second per unit."""
    return Polynomial.of([(0.01, (Units(0, 20),))], 1)


def test_energy_of_a_stated_power() -> None:
    found = energy(latency(), Wattage(50), lambda: None)
    assert found.joules.value([10]) == pytest.approx(50 * 0.1)
    assert not found.measured
    assert found.by == "50 W as stated × time"


@pytest.mark.parametrize(
    "faults", [{}, {"wraps_at": 100.0}, {"noise": 0.05, "period": 0.1}, {"missing": 0.2}, {"delay": 0.3}]
)
def test_energy_of_a_metered_forward(faults: dict[str, float]) -> None:
    clock = Clock()
    meter = SimulatedMeter(lambda: 80.0, clock, **faults)  # type: ignore[arg-type]

    def forward() -> None:
        clock.now += 0.02

    clock.now += 5.0
    found = energy(latency(), meter, forward, seconds=30.0, clock=clock)
    assert found.measured
    assert found.by == "simulated"
    assert found.watts == pytest.approx(80.0, rel=0.02)
    assert found.joules.value([10]) == pytest.approx(8.0, rel=0.02)


def test_a_meter_that_counts_nothing() -> None:
    clock = Clock()

    def forward() -> None:
        clock.now += 0.1

    with pytest.raises(NoMeter, match="counted nothing"):
        power(SimulatedMeter(lambda: 0.0, clock), forward, clock=clock)
    with pytest.raises(ValueError, match="seconds="):
        power(SimulatedMeter(lambda: 1.0, clock), forward, seconds=0, clock=clock)
