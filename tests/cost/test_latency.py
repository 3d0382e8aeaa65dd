"""The fit on exact times, the measurement on a clock that the model itself turns, the cache, one real run."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import WORKLOADS
from torch import Tensor, nn

from controlprune.cost.flops import flops
from controlprune.cost.latency import fit, latency, measure_widths, parts_of, trial_widths
from controlprune.cost.polynomial import Polynomial
from controlprune.structure import analyse


class Ticks:
    """Not the model's: what a forward pass does to the class stays."""

    now = 0.0


class Timed(nn.Module):
    """Its forward moves a clock by a millisecond and 1 ns per FLOP, at whatever widths it has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(20, 64), nn.Linear(64, 48), nn.Linear(48, 5)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.ticks = Ticks()

    def clock(self) -> float:
        return self.ticks.now

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        layers = (self.first, self.second, self.out)
        Ticks.now += 1e-3 + 1e-9 * sum(2 * len(x) * layer.weight.numel() for layer in layers)
        return self.out(self.drop(torch.relu(self.second(torch.relu(self.first(x))))))


@pytest.mark.parametrize("net", ["mlp", "cnn", "gpt"])
def test_exact_times_give_the_coefficients_back(net: str) -> None:
    workload = WORKLOADS[net]
    model, (x, _) = workload.build(workload.dense), workload.batch()
    structure = analyse(model, (x[:2],))
    parts = parts_of(structure, model)
    rates = {family: 1e-3 * (k % 3) for k, family in enumerate(dict.fromkeys(p.family for p in parts))}
    points = trial_widths(structure.sizes)
    polynomials = [Polynomial.of(part.terms, len(structure.groups)) for part in parts]
    whole = dict.fromkeys(rates, 0.0)
    for part, polynomial in zip(parts, polynomials, strict=True):
        whole[part.family] += polynomial.value(structure.sizes)

    def seconds(widths: tuple[int, ...]) -> float:
        pairs = zip(polynomials, parts, strict=True)
        return sum(rates[p.family] * q.value(widths) / whole[p.family] for q, p in pairs)

    found = fit(structure, parts, points, [seconds(widths) for widths in points])
    assert found.error < 1e-6
    for widths in trial_widths(structure.sizes, seed=5):
        assert found.seconds.value(widths) == pytest.approx(seconds(widths), rel=1e-6)


def test_an_operator_may_have_its_own_rate() -> None:
    """A first layer 30 times as slow for its FLOPs as the others: one rate for all would be far off."""
    workload = WORKLOADS["cnn"]
    structure = analyse(workload.build(workload.dense), (workload.batch()[0][:2],))
    parts = parts_of(structure, workload.build(workload.dense))
    points = trial_widths(structure.sizes)
    rates = [30.0 if k == 0 else 1.0 + 0.2 * (k % 3) for k in range(len(parts))]
    polynomials = [Polynomial.of(part.terms, len(structure.groups)) for part in parts]
    counted = [part.family.endswith("FLOPs") for part in parts]

    def seconds(widths: tuple[int, ...]) -> float:
        triples = zip(rates, polynomials, counted, strict=True)
        return 1e-12 * sum(rate * q.value(widths) for rate, q, counts in triples if counts)

    found = fit(structure, parts, points, [seconds(widths) for widths in points])
    assert found.error < 0.02
    for widths in trial_widths(structure.sizes, seed=5):
        assert found.seconds.value(widths) == pytest.approx(seconds(widths), rel=0.05)


def test_the_shrunk_model_is_what_is_timed(tmp_path: Path) -> None:
    model, x = Timed(), torch.randn(7, 20)
    structure = analyse(model, (x,))
    state, random, modes = copy.deepcopy(model.state_dict()), torch.get_rng_state(), model.training
    found = latency(structure, model, (x,), clock=model.clock, seconds=0.2, cache=tmp_path)
    work = flops(structure)
    for widths, timing in zip(found.points, found.timings, strict=True):
        assert timing.median == pytest.approx(1e-3 + 1e-9 * work.value(widths))
    assert found.error < 1e-6
    for widths in ((1, 1), (13, 40), (64, 48)):
        assert found.seconds.value(widths) == pytest.approx(1e-3 + 1e-9 * work.value(widths))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training == modes
    assert (model.first.out_features, model.second.in_features) == (64, 64)


def test_measured_once_per_machine_model_and_inputs(tmp_path: Path) -> None:
    model, x = Timed(), torch.randn(7, 20)
    structure = analyse(model, (x,))
    first = latency(structure, model, (x,), clock=model.clock, seconds=0.1, cache=tmp_path)
    then = model.ticks.now
    again = latency(structure, model, (x,), clock=model.clock, seconds=0.1, cache=tmp_path)
    assert model.ticks.now == then
    assert again.error == first.error
    assert again.seconds.value([30, 20]) == first.seconds.value([30, 20])
    latency(structure, model, (x[:3],), clock=model.clock, seconds=0.1, cache=tmp_path)
    assert model.ticks.now > then
    now = model.ticks.now
    latency(structure, model, (x,), clock=model.clock, seconds=0.1, cache=tmp_path, anew=True)
    assert model.ticks.now > now


@pytest.mark.parametrize("value", ["[1", "[]", '{"KEY": 3}', '{"KEY": {"coefficients": {}, "error": 1}}'])
def test_a_broken_cache_is_measured_anew(tmp_path: Path, value: str) -> None:
    model, x = Timed(), torch.randn(7, 20)
    structure = analyse(model, (x,))
    latency(structure, model, (x,), clock=model.clock, seconds=0.1, cache=tmp_path)
    file = tmp_path / "latency.json"
    (key,) = json.loads(file.read_text())
    file.write_text(value.replace("KEY", key))
    assert latency(structure, model, (x,), clock=model.clock, seconds=0.1, cache=tmp_path).timings


def test_trial_widths_are_on_the_rungs() -> None:
    rungs = [(4, 16, 32, 48, 64), (8, 16, 24, 32, 40, 48, 50), (3,)]
    points = trial_widths((64, 50, 3), rungs, seed=1)
    assert points[0] == (64, 50, 3)
    assert len(points) == len(set(points)) > 12
    assert all(n in allowed for widths in points for n, allowed in zip(widths, rungs, strict=True))
    assert {a for a, _, _ in points} == set(rungs[0])  # the floor too


def test_a_real_clock(tmp_path: Path) -> None:
    workload = WORKLOADS["mlp"]
    model, (x, _) = workload.build(workload.dense), workload.batch()
    structure = analyse(model, (x,))
    found = latency(structure, model, (x,), seconds=0.5, cache=tmp_path)
    dense, small = found.seconds.values([structure.sizes, (128, 128)])
    assert 0 < small < dense < 1.0
    assert np.isfinite(found.error)


def test_bad_input() -> None:
    model, x = Timed(), torch.randn(7, 20)
    structure = analyse(model, (x,))
    parts = parts_of(structure, model)
    for times in ([], [1.0, float("nan")], [1.0, 0.0]):
        with pytest.raises(ValueError, match="times="):
            fit(structure, parts, trial_widths(structure.sizes)[: len(times)], times)
    with pytest.raises(ValueError, match="seconds="):
        measure_widths(structure, model, (x,), [structure.sizes], seconds=-1)
    with torch.device("meta"):
        nowhere = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    with pytest.raises(ValueError, match="meta"):
        latency(analyse(nowhere, (torch.randn(2, 4),)), nowhere, (torch.randn(2, 4),))
