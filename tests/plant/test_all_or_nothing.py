"""A re-layout stopped on its way, by memory that is short or a handler that raises: whole or not at all."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import oracle
import pytest
import torch
from rig import assert_same_bits, bits
from test_plant import half
from torch import nn

import controlprune as cp
from controlprune.plant.interrupts import Uninterrupted
from controlprune.plant.plant import Plant

PACKAGE = str(Path(cp.__file__).parent)
LAYOUTS = {  # (masks on all?, compact) before -> after
    "mask": ((True, False), (False, False)),
    "shrink": ((True, False), (False, True)),
    "shrink what is masked": ((False, False), (False, True)),
    "expand": ((False, True), (False, False)),
    "release": ((False, True), (True, False)),
    "unmask": ((False, False), (True, False)),
}


def made(net: str = "residual", seed: int = 3) -> tuple[Plant, list[torch.Tensor]]:
    """A plant after two steps, with gradients."""
    model, structure, x, y = oracle.make(net, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    plant = Plant(model, optimizer, structure)
    for step in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if step < 2:
            optimizer.step()
    return plant, half(structure)


def everything(plant: Plant) -> dict[str, Any]:
    widths = [getattr(module, "out_features", None) for module in plant.model.modules()]
    parked = {f"plant {key}": value.clone() for key, value in plant.state_dict().items()}
    return bits(plant.model, plant.optimizer) | parked | {"widths": widths}


class Shortage:
    """Raises MemoryError at the n-th line that moves a tensor."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.endswith("layout.py") or frame.f_code.co_name in BACK:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise MemoryError
        return self


BACK = {"_put_back", "unwrite", "set_data"}  # what undoes a move


@pytest.mark.parametrize("name", LAYOUTS)
def test_memory_that_is_short_leaves_all_as_it_was(name: str) -> None:
    (all_on, compact), (then_all_on, then_compact) = LAYOUTS[name]
    draw = random.Random(0)
    gc.collect()  # no controller that an earlier test dropped ends while the memory is short
    plant, masks = made()
    ones = [torch.ones_like(mask) for mask in masks]
    plant.apply(ones if all_on else masks, compact=compact)
    before = everything(plant)
    wanted = ones if then_all_on else [m.flip(0) if name == "mask" else m for m in masks]
    stopped, after = 0, 1
    while True:
        sys.settrace(Shortage(after))
        try:
            plant.apply(wanted, compact=then_compact)
        except MemoryError:
            stopped += 1
        else:
            break
        finally:
            sys.settrace(None)
        assert_same_bits(before, everything(plant))
        after += draw.randrange(1, 40)
    assert stopped > 5
    x = oracle.make("residual", 3)[2]
    assert plant.model.eval()(x).isfinite().all()


# --- handlers that raise ---------------------------------------------------------------------------------


class TimeIsUp(Exception):
    pass


def up(number: int, frame: FrameType | None) -> None:
    raise TimeIsUp


@pytest.fixture(params=["SIGINT", "SIGTERM", "SIGALRM", "SIGUSR1"])
def number(request: pytest.FixtureRequest) -> Iterator[int]:
    chosen = getattr(signal, request.param)
    before = signal.signal(chosen, up)
    yield chosen
    signal.signal(chosen, before)


def test_a_handler_that_raises_waits_for_the_layout(number: int) -> None:
    """Sent at any line: afterwards either nothing has happened or all of it, and handlers are the user's."""
    draw = random.Random(number)
    outcomes = set()
    for _ in range(12):
        plant, masks = made("mlp")
        ones = everything(plant)
        sender = Sender(number, draw.randrange(1, 400))
        with pytest.raises(TimeIsUp):  # noqa: PT012 — the handler may be called late
            sys.settrace(sender)
            try:
                with Uninterrupted():
                    plant.apply(masks, compact=True)
            finally:
                sys.settrace(None)
            if not sender.sent:
                os.kill(os.getpid(), number)
        assert signal.getsignal(number) is up
        assert not Uninterrupted.busy
        if plant.compact:
            outcomes.add("whole")
            plant.release()
            gone = [key for key in ones if key.startswith("grad")]
            for kept in (ones, after := everything(plant)):
                for key in gone:
                    kept.pop(key)
            assert_same_bits(ones, after)
        else:
            outcomes.add("nothing")
            assert_same_bits(ones, everything(plant))
    assert "whole" in outcomes


class Sender:
    def __init__(self, number: int, after: int) -> None:
        self.number, self.left, self.sent = number, after, False

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                self.sent = True
                signal.raise_signal(self.number)
        return self


def interrupted(reached: list[str], *numbers: int) -> None:
    with Uninterrupted():
        for number in numbers:
            signal.raise_signal(number)
            reached.append(signal.Signals(number).name)


def test_each_signal_that_waited_is_delivered() -> None:
    seen: list[int] = []
    numbers = [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM]
    before = [signal.signal(n, lambda number, frame: seen.append(number)) for n in numbers]
    try:
        with Uninterrupted():
            interrupted([], *numbers, *numbers)  # inside another: waits for the outer one
            assert seen == []
        assert sorted(seen) == sorted(numbers)
    finally:
        for n, handler in zip(numbers, before, strict=True):
            signal.signal(n, handler)


def test_another_thread_needs_nothing() -> None:
    reached: list[str] = []

    def work() -> None:
        with Uninterrupted():
            reached.append("inside")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert reached == ["inside"]
