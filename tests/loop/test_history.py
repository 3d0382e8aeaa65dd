"""The record: nothing summed is lost, memory is bounded, files survive a killed process."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlprune.loop.history import History, Record, merge


def record(step: int, off: int = 0, on: int = 0, event: str = "", loss: float = 1.0) -> Record:
    return Record(
        step=step,
        loss=loss,
        active=(8 - step % 3, 4),
        widths=(8, 4),
        price={"flops": 0.5},
        reference={"flops": 0.75},
        realised={"flops": 0.5},
        off=(off, 0),
        on=(0, on),
        event=event,
        seconds=0.5 * step,
        overhead_seconds=0.25 * step,
    )


def history(capacity: int = 4096) -> History:
    return History(("a", "b"), (8, 4), {"flops": 0.5}, total_steps=100, capacity=capacity)


@given(updates=st.integers(0, 300), capacity=st.sampled_from([2, 4, 10]))
def test_memory_is_bounded_and_counts_add_up(updates: int, capacity: int) -> None:
    run = history(capacity)
    for step in range(updates):
        run.append(record(step, off=step % 5, on=step % 2, event="shrink" if step == 7 else ""))
        assert run[-1].step == step, "the newest state is always the last row"
    assert len(run) <= capacity
    assert sum(row.off[0] for row in run) == sum(step % 5 for step in range(updates))
    assert sum(row.on[1] for row in run) == sum(step % 2 for step in range(updates))
    assert sum("shrink" in row.event for row in run) == (updates > 7)
    steps = [row.step for row in run]
    assert all(b - a == run.stride for a, b in pairwise(steps[:-1])), "even resolution"


def test_a_long_run_keeps_between_half_and_all_of_its_capacity() -> None:
    run = history(capacity=64)
    for step in range(20_000):
        run.append(record(step))
    assert 32 <= len(run) <= 64


def test_merge_sums_counts_unites_events_and_keeps_the_later_state() -> None:
    merged = merge(record(1, off=2, on=1, event="shrink"), record(2, off=3, event="probe,shrink"))
    assert (merged.off, merged.on, merged.event) == ((5, 0), (0, 1), "probe,shrink")
    assert merged.active == record(2).active
    assert merged.seconds == record(2).seconds


@pytest.mark.parametrize("capacity", [4, 4096])
def test_written_and_read_back_it_goes_on_as_if_nothing_had_happened(tmp_path: Path, capacity: int) -> None:
    straight, first = history(capacity), history(capacity)
    for step in range(11):
        straight.append(record(step, off=1))
        first.append(record(step, off=1))
    resumed = History.read(first.write(tmp_path / "deep" / "run.jsonl"), capacity)
    restored = history(capacity)
    restored.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in range(11, 30):
        for run in (straight, resumed, restored):
            run.append(record(step, off=1))
    assert list(straight) == list(resumed) == list(restored)
    assert resumed.state_dict() == straight.state_dict()


def test_a_stream_holds_every_update_and_survives_a_cut_last_line(tmp_path: Path) -> None:
    run, path = history(capacity=4), tmp_path / "run.jsonl"
    run.stream(path)
    for step in range(9):
        run.append(record(step, off=1))
    assert [row.step for row in History.read(path)] == list(range(9))
    whole = path.read_text()
    path.write_text(whole[:-20])
    assert [row.step for row in History.read(path)] == list(range(8))
    again = History.read(path, capacity=4)
    assert len(again) <= 4
    assert sum(row.off[0] for row in again) == 8


def test_numbers_that_are_not_finite_travel_as_null(tmp_path: Path) -> None:
    run = history()
    run.append(replace(record(0, loss=math.inf), price={"flops": math.nan}))
    path = run.write(tmp_path / "run.jsonl")
    assert "NaN" not in path.read_text()
    back = History.read(path)[0]
    assert math.isnan(back.loss)
    assert math.isnan(back.price["flops"])


@pytest.mark.parametrize("text", ["", "{}\n", "not json\n", '{"controlprune_history": 99}\n'])
def test_a_foreign_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not a controlprune history"):
        History.read(path)


def test_a_hole_in_the_middle_is_an_error_not_a_guess(tmp_path: Path) -> None:
    run = history()
    for step in range(3):
        run.append(record(step))
    path = run.write(tmp_path / "run.jsonl")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2][:10], lines[3]]))
    with pytest.raises(ValueError, match="line 3 is not JSON"):
        History.read(path)


def test_a_record_or_a_state_of_other_groups_is_refused() -> None:
    run = history()
    with pytest.raises(ValueError, match=r"record\.off has 1 entries"):
        run.append(replace(record(0), off=(1,)))
    other = History(("a", "c"), (8, 4), {}, total_steps=1)
    with pytest.raises(ValueError, match="history of other groups"):
        run.load_state_dict(other.state_dict())
