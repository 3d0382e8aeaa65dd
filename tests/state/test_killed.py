"""Processes that die at any moment: the others get torch's error, and a restart ends where it would have.

`kill -9` of one rank, then of all, in a run with shrinks, an expansion and saves; a KeyboardInterrupt between
any two lines of the controller; the example under torchrun.
"""

from __future__ import annotations

import copy
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rig import QUICK, Rig, assert_same_bits, bits, rig
from test_replicas import Run
from workers import ranks, start

import controlprune as cp
from controlprune.loop.replicas import digest
from controlprune.plant.interrupts import Uninterrupted
from controlprune.state.files import replacing

STEPS, EVERY = 80, 4


@ranks(2)
def life(rank: int, folder: str) -> None:
    """From the last checkpoint, if there is one, to the end."""
    run, place = Run(rank, steps=STEPS), Path(folder, "checkpoint.pt")
    parts = (run.controller, run.inner, run.optimizer)
    if place.exists():
        for part, state in zip(parts, torch.load(place), strict=True):
            part.load_state_dict(state)
        run.step = run.controller.steps
    dist.barrier()
    Path(folder, f"up {rank}").touch()
    while run.step < STEPS:
        run.train(1)
        if run.step in (25, 49):
            run.controller.shrink()
        if run.step == 37:
            run.controller.expand()
        if run.step % EVERY == 0:
            run.controller.sync()
            if rank == 0:
                with replacing(place) as part:
                    torch.save([part.state_dict() for part in parts], part)
    assert run.controller._run.replicas.repairs == 0
    run.controller.finalize()
    cost = run.controller.cost()["flops"].fraction
    if rank == 0:
        found = {"cost": cost, "digest": digest(bits(run.inner, run.optimizer))}
        Path(folder, "end.json").write_text(json.dumps(found))


class Life:
    """One start of all ranks, from their being up to their end."""

    def __init__(self, folder: Path, world: int = 2) -> None:
        self.folder, self.meeting = folder, folder / f"meeting {time.monotonic_ns()}"
        self.meeting.mkdir(parents=True)
        for name in folder.glob("up *"):
            name.unlink()
        self.processes = start(life, world, str(self.meeting), {"folder": str(folder)})
        while len(list(folder.glob("up *"))) < world:
            assert all(p.exitcode in (None, 0) for p in self.processes), self.errors()
            time.sleep(0.01)

    def errors(self) -> str:
        return "\n".join(path.read_text() for path in self.meeting.glob("failed *"))

    def finish(self) -> Any:
        for process in self.processes:
            process.join(60.0)
        assert [p.exitcode for p in self.processes] == [0] * len(self.processes), self.errors()
        return json.loads((self.folder / "end.json").read_text())

    def kill(self, victims: list[int]) -> None:
        for victim in victims:
            self.processes[victim].kill()
        for process in self.processes:
            process.join(60.0)
        assert all(p.exitcode is not None for p in self.processes), "a survivor hangs"


def undisturbed(folder: Path) -> tuple[Any, float]:
    """The end of a run, and how many seconds it took once up."""
    began = Life(folder)
    started = time.monotonic()
    return began.finish(), time.monotonic() - started


def killed_and_restarted(tmp_path: Path, rounds: int, draw: random.Random) -> None:
    expected, seconds = undisturbed(tmp_path / "undisturbed")
    assert expected["cost"] <= 0.5
    resumed = 0
    for number in range(rounds):
        folder = tmp_path / f"round {number}"
        for victims in ([draw.randrange(2)], [0, 1]):
            run = Life(folder)
            time.sleep(draw.random() * seconds)
            run.kill(victims)
            if len(victims) == 1 and (failed := run.errors()):
                assert re.search(r"RuntimeError|DistBackendError|DistNetworkError", failed)
            resumed += (folder / "checkpoint.pt").exists()
        assert Life(folder).finish() == expected, f"round {number}"
    assert resumed


def test_ranks_that_are_killed(tmp_path: Path) -> None:
    killed_and_restarted(tmp_path, 1, random.Random(0))


@pytest.mark.slow
def test_ranks_that_are_killed_at_20_moments(tmp_path: Path) -> None:
    killed_and_restarted(tmp_path, 10, random.Random(1))


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 3])
def test_a_restart_with_another_number_of_ranks(world: int, tmp_path: Path) -> None:
    run = Life(tmp_path / "run")
    while not (tmp_path / "run" / "checkpoint.pt").exists():
        time.sleep(0.01)
    run.kill([0, 1])
    end = Life(tmp_path / "run", world).finish()
    assert end["cost"] <= 0.5


# --- the example --------------------------------------------------------------------------------------


def torchrun(folder: Path, ranks: int, steps: int) -> str:
    script = Path(__file__).parents[2] / "examples" / "ddp.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
               str(script), f"--folder={folder}", f"--steps={steps}", "--save-every=20"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_under_torchrun(tmp_path: Path) -> None:
    said = torchrun(tmp_path, 2, 60)
    assert re.search(r"2 ranks: [\d.]+% right at [1-4]?\d\.\d% of the dense FLOPs", said)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pt", "small.safetensors"}


@pytest.mark.slow
def test_the_example_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    torchrun(tmp_path, 2, 60)
    (tmp_path / "small.safetensors").unlink()
    assert re.search(r"1 ranks: ", torchrun(tmp_path, 1, 60))
    assert (tmp_path / "small.safetensors").exists()


# --- Ctrl-C -------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def default_handler() -> Iterator[None]:
    """A shell that starts pytest in the background lets it ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Interrupt:
    """Presses Ctrl-C at the n-th line that the package runs."""

    def __init__(self, after: int) -> None:
        self.left, self.folder = after, str(Path(cp.__file__).parent)

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(self.folder):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGINT)
        return self


def interrupted(run: Rig, first: int, last: int, after: int) -> bool:
    """Trains; was it interrupted?"""
    sys.settrace(Interrupt(after))
    try:
        run.train(first, last)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def lines(run: Rig, first: int, last: int) -> int:
    """How many lines of the package that training runs."""
    counter = Interrupt(10**9)
    sys.settrace(counter)
    run.train(first, last)
    sys.settrace(None)
    return 10**9 - counter.left


def one() -> Rig:
    return rig("residual", policy=QUICK, total_steps=40, shrink_at=25)


def go_on(run: Rig) -> None:
    """In the same process, with the same objects."""
    run.optimizer.zero_grad()
    run.train(run.controller.steps, 40)
    assert run.controller.cost()["flops"].fraction <= 0.5
    run.controller.finalize()


def interrupt_at(moments: int, draw: random.Random) -> None:
    run = one()
    run.train(0, 18)
    parts = (run.controller, run.model, run.optimizer)
    states = [copy.deepcopy(part.state_dict()) for part in parts]
    total = lines(run, 18, 30)
    run.train(30, 40)
    expected = bits(run.model, run.optimizer)
    for after in (draw.randrange(1, total) for _ in range(moments)):
        run = one()
        run.train(0, 18)
        assert interrupted(run, 18, 30, after), after
        other = copy.deepcopy(run.controller.state_dict())  # it can be saved, and belongs to its model
        weights, moments_of = copy.deepcopy(run.model.state_dict()), copy.deepcopy(run.optimizer.state_dict())
        go_on(run)
        again = one()
        for part, state in zip(
            (again.controller, again.model, again.optimizer), (other, weights, moments_of), strict=True
        ):
            part.load_state_dict(state)
        go_on(again)
        run = one()
        run.train(0, 18)
        assert interrupted(run, 18, 30, after), after
        run.optimizer.zero_grad()
        for part, state in zip((run.controller, run.model, run.optimizer), states, strict=True):
            part.load_state_dict(copy.deepcopy(state))
        run.train(18, 40)
        assert_same_bits(expected, bits(run.model, run.optimizer))


def test_ctrl_c_between_any_two_lines() -> None:
    interrupt_at(8, random.Random(0))


@pytest.mark.slow
def test_ctrl_c_at_60_moments() -> None:
    interrupt_at(60, random.Random(1))


def press_twice(reached: list[str]) -> None:
    with Uninterrupted():
        signal.raise_signal(signal.SIGINT)
        reached.append("after the first")
        signal.raise_signal(signal.SIGINT)
        reached.append("after the second")


def test_a_second_ctrl_c_does_not_wait() -> None:
    reached: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        press_twice(reached)
    assert reached == ["after the first"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
