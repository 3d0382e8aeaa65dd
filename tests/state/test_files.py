"""A file is whole or what it was: full disks, killed processes, places where nothing can be written."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from rig import NETS, rig
from test_history import history, record

import controlprune as cp
from controlprune.state.checksum import checksum
from controlprune.state.files import replacing

MESSAGE = r"path=.*could not be written \(.*\); what was there before still is"


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file can grow beyond `room` bytes: the system says so at the write, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_is_replaced_whole_and_keeps_its_mode(tmp_path: Path) -> None:
    place = tmp_path / "a"
    place.write_text("old")
    place.chmod(0o640)
    with replacing(place) as part:
        part.write_text("new")
        assert place.read_text() == "old"
    assert place.read_text() == "new"
    assert place.stat().st_mode & 0o777 == 0o640
    link = tmp_path / "link"
    link.symlink_to(place)
    with replacing(link) as part:
        part.write_text("through the link")
    assert link.is_symlink()
    assert place.read_text() == "through the link"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "link"]


def test_what_interrupts_the_writing_leaves_the_old_file(tmp_path: Path) -> None:
    place = tmp_path / "a"
    place.write_text("old")
    for error in (KeyboardInterrupt(), ValueError(), MemoryError()):
        with pytest.raises(type(error)):
            break_off(place, error)
        assert [p.name for p in tmp_path.iterdir()] == ["a"]
        assert place.read_text() == "old"


def break_off(place: Path, error: BaseException) -> None:
    with replacing(place) as part:
        part.write_text("half")
        raise error


def test_places_where_nothing_can_be_written(tmp_path: Path) -> None:
    controller = rig().controller
    for place in (tmp_path, "/dev/null"):
        with pytest.raises(OSError, match=r"path=.*is no plain file"):
            cp.save(controller, place)
    assert not Path("/dev/null").is_file()
    with pytest.raises(FileNotFoundError, match=MESSAGE):
        cp.save(controller, tmp_path / "no folder" / "a")


@pytest.mark.parametrize("room", [0, 100, 3000])
def test_a_full_disk_while_saving(room: int, tmp_path: Path) -> None:
    run, place = rig(), tmp_path / "small.safetensors"
    cp.save(run.controller, place)
    before = place.read_bytes()
    run.train(0, 4)
    with full_disk(room), pytest.raises(OSError, match=MESSAGE):
        cp.save(run.controller, place)
    assert place.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [place.name]
    cp.save(run.controller, place)
    assert place.read_bytes() != before


def test_a_full_disk_while_recording(tmp_path: Path) -> None:
    """The training goes on, told once; the file stays whole, and has all rows when there is room again."""
    run = rig()
    place = run.controller.history.stream(tmp_path / "run.jsonl")
    run.train(0, 8)
    length = place.stat().st_size
    with full_disk(length + 20), pytest.warns(UserWarning, match=r"run\.jsonl.*could not be written") as told:
        run.train(8, 20)
    assert len(told) == 1
    assert place.stat().st_size == length
    assert len(cp.History.read(place)) == 2
    run.train(20, 28)
    assert [row.step for row in cp.History.read(place)] == [row.step for row in run.controller.history]
    with full_disk(20), pytest.raises(OSError, match=MESSAGE):
        run.controller.history.write(place)
    assert len(cp.History.read(place)) == 7


def test_a_tampered_history_is_refused(tmp_path: Path) -> None:
    run = history()
    run.append(record(1))
    path = run.write(tmp_path / "run.jsonl")
    whole = path.read_text()
    for old, new in (('"names":["a","b"]', '"names":7'), ('"stride":1', '"stride":"x"'), ('"step":1,', "")):
        assert old in whole
        path.write_text(whole.replace(old, new))
        with pytest.raises(ValueError, match=r"run\.jsonl: the file is corrupt"):
            cp.History.read(path)


KILLED = """
import os, sys, time, torch, controlprune as cp
from rig import NETS, rig
run, place = rig(), sys.argv[1]
cp.save(run.controller, place)
print("saved", flush=True)
for step in range(100000):
    with torch.no_grad():
        next(iter(run.model.parameters())).fill_(float(step))
    time.sleep(0.002)
    cp.save(run.controller, place)
"""


def test_a_process_killed_while_saving(tmp_path: Path) -> None:
    place, tests = tmp_path / "small.safetensors", Path(__file__).parent.parent
    path = os.pathsep.join([str(tests), str(tests.parent)])
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(place)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
    ) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            for _ in range(20):  # what is read while it is being written is whole, too
                cp.load(place, fresh())
        finally:
            child.kill()
    weight = next(iter(cp.load(place, fresh()).parameters()))
    assert weight.unique().numel() == 1


def fresh() -> torch.nn.Module:
    return NETS["mlp"][0]()


def test_the_checksum_tells_what_differs_and_only_that() -> None:
    value = {"a": [1, 2.5, None, "x"], "b": {"0": torch.arange(4), "1": True}}
    same = {"b": {1: True, 0: torch.arange(4)}, "a": (1, 2.5, None, "x")}
    assert checksum(value) == checksum(same)
    others = [
        {**value, "a": [1, 2.5, None]},
        {**value, "a": [1, 2.5, None, "y"]},
        {**value, "a": [True, 2.5, None, "x"]},
        {**value, "b": {"0": torch.arange(4), "1": 1}},
        {**value, "b": {"0": torch.arange(4).int(), "1": True}},
        {**value, "b": {"0": torch.arange(4).reshape(2, 2), "1": True}},
        {**value, "b": {"0": torch.tensor([0, 1, 2, 4]), "1": True}},
        {**value, "c": 0},
    ]
    assert len({checksum(other) for other in [value, *others]}) == 9
