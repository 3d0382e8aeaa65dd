"""What a run has used: counted FLOPs, a clock under the test's control."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from controlprune.budget import Target
from controlprune.cost.instruments import Instruments
from controlprune.cost.run_totals import Accounts

WIDTHS = (3,)


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def accounts(clock: Clock, **targets: Target) -> Accounts:
    return Accounts(targets, 100, 3e6, Instruments(clock=clock))


def test_flops_are_counted_on_the_layout_that_ran() -> None:
    book = accounts(Clock(), train_flops=Target(0.5, True))
    for use in [1.0] * 10 + [0.4] * 20:
        book.step(use)
    book.beside(3.0)  # three forwards are a step
    (account,) = book.read({}, WIDTHS)
    assert account.spent == pytest.approx((10 + 8 + 1) / 100)
    assert account.limit == 0.5
    assert book.used() == {"train_flops": pytest.approx(19 * 3e6)}
    assert book.dense() == {"train_flops": 3e8}


def test_a_limit_in_flop() -> None:
    book = accounts(Clock(), train_flops=Target(6e7, False))
    assert book.read({}, WIDTHS)[0].limit == pytest.approx(0.2)


def test_time_is_what_the_clock_says() -> None:
    clock = Clock()
    book = accounts(clock, train_time=Target(0.5, True))
    for _ in range(20):
        clock.now += 0.01
        book.step(1.0)
    (account,) = book.read({"train_time": 1.0}, WIDTHS)
    assert account.spent == pytest.approx(0.2)
    assert account.limit == 0.5
    assert account.use == pytest.approx(1.0)
    book.laid_out()
    for _ in range(20):
        clock.now += 0.006
        book.step(0.5)
    (account,) = book.read({"train_time": 0.575}, WIDTHS)
    assert account.use == pytest.approx(0.6)
    assert account.spent == pytest.approx(0.2 + 0.6 * 0.2)
    assert book.used()["train_time"] == pytest.approx(0.32)
    assert book.dense()["train_time"] == pytest.approx(1.0)


def test_seconds_become_a_fraction_once_a_dense_step_is_known() -> None:
    clock = Clock()
    book = accounts(clock, train_time=Target(0.4, False))
    assert book.read({"train_time": 1.0}, WIDTHS) == []
    for _ in range(5):
        clock.now += 0.01
        book.step(1.0)
    assert book.read({"train_time": 1.0}, WIDTHS)[0].limit == pytest.approx(0.4)


def test_what_the_controller_takes_is_spent_but_not_dense_training() -> None:
    clock = Clock()
    book = accounts(clock, train_time=Target(0.5, True))
    for _ in range(20):
        clock.now += 0.012
        book.step(1.0, own=0.002)
    [account] = book.read({"train_time": 1.0}, WIDTHS)
    assert book.dense()["train_time"] == pytest.approx(1.0)
    assert account.use == pytest.approx(1.2)
    assert account.spent == pytest.approx(0.24)


def test_a_run_that_never_was_dense_takes_the_models_word() -> None:
    clock = Clock()
    book = accounts(clock, train_time=Target(0.5, True))
    for _ in range(5):
        clock.now += 0.004
        book.step(0.3)
    book.read({"train_time": 0.4}, WIDTHS)
    assert book.dense()["train_time"] == pytest.approx(1.0)


def test_a_clock_that_jumps_is_left_out() -> None:
    clock = Clock()
    book = accounts(clock, train_time=Target(0.5, True))
    for k in range(20):
        clock.now += {10: 3600.0, 12: -50.0}.get(k, 0.01)
        book.step(1.0)
    assert book.jumps == 2
    assert book.used()["train_time"] == pytest.approx(0.18)


def test_what_was_spent_survives_a_restart() -> None:
    clock = Clock()
    targets = {"train_time": Target(0.5, True), "train_flops": Target(0.5, True)}
    book = accounts(clock, **targets)
    for _ in range(20):
        clock.now += 0.01
        book.step(1.0)
    book.read({"train_time": 1.0}, WIDTHS)
    clock.now += 1e6  # the process was gone for long
    again = accounts(clock, **targets)
    again.load_state_dict(book.state_dict())
    assert again.used() == book.used()
    clock.now += 0.01
    again.step(1.0)
    assert again.used()["train_time"] == pytest.approx(0.21)


def test_time_cannot_join_late() -> None:
    book = accounts(Clock(), train_flops=Target(0.5, True))
    with pytest.raises(ValueError, match="train_time must be under budget from the start"):
        book.retarget({"train_time": Target(0.5, True)}, 100)
    assert book.targets == {"train_flops": Target(0.5, True)}
    assert math.isfinite(book.used()["train_flops"])
