"""Plain text that lines up and says what it means."""

from __future__ import annotations

import torch
from runs import made_up_run
from torch import nn

from controlprune.app.report import groups_table, quantity, refusals_table, structure_report, summary, table
from controlprune.loop.history import History
from controlprune.structure import analyse
from controlprune.structure.groups import Refusal, Structure


def test_a_table_lines_up_words_left_numbers_right() -> None:
    text = table(["name", "size"], [["a", "5"], ["longer", "10 %"]])
    assert text.splitlines() == ["name    size", "──────  ────", "a          5", "longer  10 %"]


def test_a_table_without_rows_has_its_headers() -> None:
    assert table(["a", "bc"], []).splitlines()[0] == "a  bc"


def test_quantities_carry_a_prefix() -> None:
    assert quantity(1_234_567, "FLOP") == "1.23 MFLOP"
    assert quantity(0) == "0"
    assert quantity(999) == "999"
    assert quantity(999_700) == "1 M"
    assert quantity(2.5e12, "FLOP") == "2.5 TFLOP"


def test_the_groups_of_a_model_with_their_shares_and_ranges() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    structure = analyse(model, (torch.randn(3, 4),))
    line = groups_table(structure).splitlines()[2].split()
    assert line[1] == "6"
    assert line[2:6] == ["100.0", "%", "95.5", "%"], "all FLOPs; all but the last bias of 44 parameters"
    text = structure_report(structure)
    assert "16.7 %" in text, "one of six units left"


def test_refusals_are_listed_with_their_reason() -> None:
    refused = Refusal("conv", 8, "an operator without a rule")
    structure = Structure((), (refused,), {}, frozenset(), (), ())
    assert "an operator without a rule" in refusals_table(structure)
    assert "Nothing in this model can be pruned" in structure_report(structure)
    assert "an operator without a rule" in structure_report(structure)


def test_the_summary_of_a_run_says_where_it_ended() -> None:
    run = made_up_run()
    text = summary(run)
    assert f"step {run[-1].step} of {run.total_steps}" in text
    assert "2 shrinks" in text
    assert all(name in text for name in run.names)
    assert summary(History(("a",), (1,), {}, 1)).startswith("empty history")
