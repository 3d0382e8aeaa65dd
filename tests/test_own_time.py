"""The study of the controller's own time: every step is of one kind, and a run is known by its masks."""

from __future__ import annotations

from analysis.own_time import run


def test_every_step_is_of_one_kind() -> None:
    found = run(120)
    counts = {kind: len(seconds) for kind, seconds in found.own.items()}
    assert sum(counts.values()) == 120 == len(found.rest) == len(found.nothing)
    assert counts["change"] >= 1
    assert counts["observation"] > 10
    assert min(min(seconds) for seconds in found.own.values() if seconds) > 0
    assert "| plain |" in found.table()


def test_the_same_run_is_alike() -> None:
    assert run(40).alike == run(40).alike
