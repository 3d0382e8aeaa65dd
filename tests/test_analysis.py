"""The studies: intervals that cover, results that survive a kill, all sides in every piece."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from accuracy import piece, summary
from baselines import structure_of, uniform_widths
from equal_compute import schedules
from measure import Results, bootstrap, paired
from plant import Trace, identify, sensitivity, simulate
from probes import Held, binary, multisine, probed
from schedules import cubic, one_shot, training_share

from controlprune.app.tasks import load
from controlprune.cost.flops import flops
from controlprune.price.pi import PI


def test_the_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    draw = np.random.default_rng(1)
    samples = draw.normal(3.0, 1.0, size=(200, 30))
    covered = sum(b.low <= 3.0 <= b.high for b in (bootstrap(list(s), draws=500) for s in samples))
    assert 0.88 <= covered / 200 <= 0.99


def test_the_interval_of_one_value_is_that_value_and_of_none_an_error() -> None:
    only = bootstrap([2.0])
    assert (only.mean, only.low, only.high, only.count) == (2.0, 2.0, 2.0, 1)
    with pytest.raises(ValueError, match="values is empty"):
        bootstrap([])


def test_differences_are_paired_by_seed() -> None:
    rows = [{"side": "a", "seed": s, "v": 10.0 * s + 1} for s in range(4)]
    rows += [{"side": "b", "seed": s, "v": 10.0 * s} for s in range(1, 5)]
    found = paired(rows, "a", "b", lambda row: row["v"], ["seed"])
    assert (found.mean, found.low, found.high, found.count) == (1.0, 1.0, 1.0, 3)


def test_results_resume_after_a_line_that_was_cut_short(tmp_path: Path) -> None:
    results = Results(tmp_path / "deep" / "r.jsonl")
    assert results.rows() == []
    results.append([{"seed": 0}, {"seed": 1}])
    with results.path.open("a") as file:
        file.write('{"seed": 2, "si')
    results.append([{"seed": 3}])
    assert [row["seed"] for row in results.rows()] == [0, 1, 3]
    assert results.has(seed=3)
    assert not results.has(seed=2)


def test_uniform_widths_lie_inside_the_budget_and_near_it() -> None:
    structure = structure_of(load("digits"))
    cost = flops(structure)
    share = cost.value(uniform_widths(structure, 0.4)) / cost.value(structure.sizes)
    assert 0.34 <= share <= 0.4


def test_a_piece_measures_every_side() -> None:
    task = load("digits")
    rows = piece(task, structure_of(task), budget=0.5, seed=0, steps=12)
    share = {row["side"]: row["flops"] for row in rows}
    assert len(share) == len(rows)
    assert share.pop("dense") == 1
    assert all(used <= 0.5 for used in share.values())
    assert share["controlled"] == share["same from scratch"], "the very widths the controlled one ended with"
    assert share["uniform from scratch"] == share["static"] == share["after"]
    assert all(0 < row["accuracy"] <= 100 and row["time"] > 0 for row in rows)
    text = summary(rows)
    assert all(row["side"] in text for row in rows)


def test_a_known_plant_is_identified_and_predicted() -> None:
    draw = np.random.default_rng(0)
    u = np.array([binary(300, 5, 0.3, seed) for seed in (1, 2)])
    y = np.full_like(u, 0.4)
    for run, constant in enumerate((0.2, 0.25)):
        for t in range(1, 300):
            y[run, t] = 0.5 * y[run, t - 1] - 0.1 * u[run, t - 1] + constant + 1e-3 * draw.normal()
    fit = identify([Trace(use, np.zeros(300), price) for use, price in zip(y, u, strict=True)])
    assert fit.delay == 1
    assert fit.response.gain == pytest.approx(0.2, rel=0.05)
    assert fit.response.pole == pytest.approx(0.5, abs=0.03)
    model, now, average = fit.errors[10]
    assert model < 0.1 * min(now, average)
    assert simulate(fit, np.full(60, 1.0), 0.0)[-1] == pytest.approx(-0.2, rel=0.05)


def test_the_sensitivity_of_a_known_loop_is_measured() -> None:
    """y_{t+1} = −g u_{t+1}, u_{t+1} = u_t + K (e_t + d_t): S = 1 / (1 + K g / (z − 1))."""
    harmonics, period, loop_gain = (1, 3, 8), 30, 0.4
    wave = multisine(period, harmonics, 0.05)
    errors, y = [], 0.0
    for t in range(20 * period):
        errors.append(y)
        y -= loop_gain * (y + wave[t % period])
    found, noise = sensitivity(np.array(errors[10 * period :]), wave, harmonics)
    z = np.exp(2j * np.pi * np.array(harmonics) / period)
    assert found == pytest.approx(1 / (1 + loop_gain / (z - 1)), rel=1e-6)
    assert noise.max() < 1e-6


def test_open_loop_schedules_end_where_they_should_and_cost_what_they_say() -> None:
    structure = structure_of(load("digits-mlp"))
    end = uniform_widths(structure, 0.4)
    for cuts in schedules(structure, 0.4, 0.6, 600).values():
        assert cuts[max(cuts)] == end
        assert training_share(structure, cuts, 600) == pytest.approx(0.6, abs=0.01)
    share = flops(structure).value(end) / flops(structure).value(structure.sizes)
    assert training_share(structure, one_shot(structure, 0.4, 150), 600) == pytest.approx(0.25 + 0.75 * share)
    widths = [cuts for _, cuts in sorted(cubic(structure, 0.4, 10, 200, 10).items())]
    assert all(a >= b for before, after in pairwise(widths) for a, b in zip(before, after, strict=True))


def test_a_probe_delays_and_disturbs_what_the_regulator_is_given() -> None:
    plain = PI(integral=1.0)
    late = probed(plain, delay=2, disturbance=(0.1, 0.0))
    state = late.init()
    prices = []
    for error in (0.3, 0.0, 0.0, 0.0, 0.0):
        state = late.update(state, error)
        prices.append(np.log(state.price))
    assert np.diff([0.0, *prices]) == pytest.approx([0.4, 0.3, 0.4, 0.0, 0.1])
    held = Held(dither=(0.0, 0.5))
    assert np.log(held.update(held.init(), 9.0).price) == 0.5
