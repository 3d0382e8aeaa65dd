"""Code that asks for sizes is followed: every kind of width pattern is tried, or the group stays."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from controlprune.structure import analyse
from controlprune.structure.extents import Units
from controlprune.structure.guards import Guard, Reckoned, Unprovable, unseen
from controlprune.structure.tape.reading import SizeReader
from controlprune.structure.tape.seen import SeenFloat, SeenInt, listening, plain

from .agreement import worst
from .models.guarded import BENIGN, GUARDS, Guarded


@pytest.mark.parametrize("name", GUARDS)
def test_no_width_pattern_is_wrong(name: str) -> None:
    torch.manual_seed(0)
    model, x = GUARDS[name](), torch.randn(4, 5)
    structure = analyse(model, x)
    assert worst(model, x, structure) < 1e-5, structure.names


@pytest.mark.parametrize("name", BENIGN)
def test_questions_whose_answers_do_not_matter_cost_nothing(name: str) -> None:
    torch.manual_seed(0)
    model, x = BENIGN[name](), torch.randn(4, 5)
    structure = analyse(model, x)
    assert structure.names == ("first", "second"), structure.refused
    assert worst(model, x, structure) < 1e-5


def test_a_size_that_is_lost_is_told_with_the_line() -> None:
    torch.manual_seed(0)
    (refusal,) = [
        r for r in analyse(GUARDS["through_length"](), torch.randn(4, 5)).refused if r.name == "first"
    ]
    assert "makes another number of its size, which cannot be followed" in refusal.reason
    assert "guarded.py" in refusal.reason
    assert "len(h[0]) == 30" in refusal.reason


def test_a_path_that_asks_for_more_is_not_taken() -> None:
    def follow(net: Guarded, h: Tensor) -> Tensor:
        if h.shape[1] < 40 and h.shape[1] % 11 == 5:
            return -h
        return h

    torch.manual_seed(0)
    structure = analyse(Guarded(follow, 64), torch.randn(4, 5))
    (refusal,) = [r for r in structure.refused if r.name == "first"]
    assert "asks about sizes that it does not ask about when dense: test_guards.py" in refusal.reason


# --- the numbers ---------------------------------------------------------------------------------------


def test_followed_numbers_compute_what_plain_ones_do() -> None:
    n = SeenInt(12, 12)
    with listening(lambda question: None), SizeReader():
        for f in (
            lambda k: k + 1,
            lambda k: 30 - k,
            lambda k: k // 5 + 7 // k,
            lambda k: k / 5,
            lambda k: k**-0.5 + 2**k,
            lambda k: divmod(k, 5)[1] * divmod(50, k)[0],
            lambda k: math.ceil(k / 5) + math.floor(k / 5),
            lambda k: -k % 7 + abs(-k) + (k & 6) + (k << 2),
            lambda k: max(k, 3) + min(k, 3) + (k in (3, 12)),
            lambda k: int(k) + len(f"{k}") + hash(k) + round(k / 7),
            lambda k: list(range(100))[k] + torch.zeros(k).view(3, k // 3).shape[1],
        ):
            assert plain(f(n)) == f(12)


def test_questions_know_what_they_are_about() -> None:
    asked = []
    n = SeenInt(12, 12)
    with listening(asked.append):
        assert math.ceil(n / 5) > 2
        assert not n % 2 or n
    assert [(q.operator, q.terms[-1]) for q in asked[:1]] == [("gt", 2)]
    assert [q.operator for q in asked[1:]] == ["truth"]
    assert asked[0].line.startswith("test_guards.py:")
    assert type(n + 1) is int  # nobody listens any more
    assert isinstance(SeenFloat(0.5, 1), float)


def test_a_counter_in_a_long_loop_is_let_go() -> None:
    asked, n = [], SeenInt(3, 3)
    with listening(asked.append):
        total = 0
        for _ in range(5000):
            total = total + n
    assert total == 15000
    assert [q.operator for q in asked][:1] == ["unknown"]


# --- kinds ---------------------------------------------------------------------------------------------


def guard(operator: str, *terms: object) -> Guard:
    return Guard(operator, terms, "line")  # type: ignore[arg-type]


def rungs(*sizes: int) -> list:
    return [np.arange(1, n + 1) for n in sizes]


def test_each_kind_is_asked_for_twice() -> None:
    parity = guard("eq", Reckoned("mod", (Units(0, 12), 2)), 0)
    found = unseen([parity], rungs(12, 5), [])
    assert sorted(column[0] % 2 for column in found) == [0, 0, 1, 1]
    assert unseen([parity], rungs(12, 5), [(4, 1), (3, 1)]) == []
    assert {column[0] % 2 for column in unseen([parity], rungs(12, 5), [(4, 1)])} == {1}


def test_rare_kinds_are_found() -> None:
    one = guard("eq", Units(0, 4096), 1234)
    assert [column[0] for column in unseen([one], rungs(4096), [(1,)])] == [1234]
    equal = guard("eq", Units(0, 3000), Units(1, 5000))
    assert all(column[0] == column[1] for column in unseen([equal], rungs(3000, 5000), [(1, 2)]))


def test_only_widths_that_can_be_are_asked_for() -> None:
    odd = guard("truth", Reckoned("mod", (Units(0, 64), 2)))
    assert unseen([odd], [np.arange(8, 65, 8)], [(16,)]) == []
    assert unseen([odd], [np.array([64])], []) == []


def test_what_cannot_be_told_is_not_guessed() -> None:
    three = guard("eq", Units(0, 4), Reckoned("add", (Units(1, 4), Units(2, 4))))
    with pytest.raises(Unprovable) as error:
        unseen([three], rungs(4, 4, 4), [])
    assert error.value.groups == (0, 1, 2)
    many = [guard("eq", Units(0, 64), k) for k in range(1, 40)]
    with pytest.raises(Unprovable):
        unseen(many, rungs(64), [])
