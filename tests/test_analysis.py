"""The studies: intervals that cover, results that survive a kill, all sides in every piece."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from accuracy import piece, summary
from baselines import structure_of, uniform_widths
from measure import Results, bootstrap, paired

from controlprune.cost.flops import flops
from controlprune.tasks import load


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
