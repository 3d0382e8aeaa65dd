"""The studies of single weights, rotation and masks: each side runs on a small task, and tables show it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_bench import _tiny

from analysis import depth, masking, rotation, weights
from analysis.bench.run import measured
from analysis.bench.sides.side import Side
from analysis.measure import Results


@pytest.mark.parametrize("side", ["static, SNIP", "RigL", "controller, from the budget"])
def test_a_policy_ends_at_its_density(side: str) -> None:
    row = measured(_tiny(), weights.Weights(weights.POLICIES[side]), side, 0.2, 0, lambda *_: None)
    assert 0.15 < row["density"] <= 0.2
    assert row["train_flops"] < 1.0
    assert (row["exchanged"] > 0) == (side != "static, SNIP")


def test_the_table_of_weights_has_a_line_a_policy(tmp_path: Path) -> None:
    results = Results(tmp_path / "weights.jsonl")
    task = _tiny()
    found = {"dense": Side(), "RigL": weights.Weights(weights.POLICIES["RigL"])}
    for side, made in found.items():
        row = measured(task, made, side, 1.0 if side == "dense" else 0.2, 0, lambda *_: None)
        results.append([row | {"task": "mnist"}])
    lines = weights.tables(results.rows()).splitlines()
    assert lines[0].startswith(f"**mnist, {task.steps} steps, dense ")
    assert lines[2].startswith("| policy | 80 % off")
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| RigL"]


@pytest.mark.parametrize("turns", [True, False])
def test_a_rotation_is_small_on_the_way(turns: bool) -> None:
    row = measured(_tiny(), rotation.Rotated(turns=turns), "rotation", 0.25, 0, lambda *_: None)
    assert row["train_flops"] < 0.5
    assert (row["flops"] == 1.0) == turns


@pytest.mark.slow  # timings at attach, ten seconds of them
def test_depth_and_width_under_one_latency() -> None:
    """What a machine that does other things too measures of so small a net is not asserted."""
    task = replace(_tiny(), dense=lambda seed: depth.resnet(seed, (8, 16), 1, channels=1), glance=None)
    rows = [measured(task, Side(), "dense", 0.9, 0, lambda *_: None)]
    rows += [measured(task, depth.Cut("channel+layer"), "both", 0.9, 0, lambda *_: None)]
    assert len(rows[1]["channels"]) == 4
    assert 0 <= rows[1]["branches"] <= 2
    assert rows[1]["reached"] > 0
    assert [line.split(" | ")[0] for line in depth.tables(rows).splitlines()[2:]] == ["| dense", "| both"]


def test_tiles_and_masks_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "ROUNDS", 2)
    rows = [*masking.masks("MLP 784-300-100, 128 rows"), masking.blocks((128, 64), 0.5, rows=8)]
    assert all(row["ratio"] > 0 for row in rows[:-1])
    made = masking.tables(rows)
    assert made["masks"].count("\n") == 5
    assert "128x64" in made["blocks"]
