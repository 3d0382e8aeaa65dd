"""Tables of the bench: what counts as a rival, which row counts, and where a page takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from analysis.bench import main as command
from analysis.bench.sides import Side
from analysis.bench.tables import placed, summary, tables
from analysis.bench.tasks.graph import gcn
from analysis.bench.tasks.language import language
from analysis.measure import Results

DATA = Path(__file__).parent.parent.parent / "shared" / "data"


def _row(side: str, seed: int, figure: float, name: str = "accuracy", **other: Any) -> dict[str, Any]:
    usual = {"budget": 0.5, "steps": 40, "flops": 0.5, "train_flops": 0.7, "seconds": 3.0, "kernel": 0.5}
    return usual | {"side": side, "seed": seed, name: figure, "parameters": 10**6, "latency": 0.002} | other


def _cells(text: str, side: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith((f"| {side} |", f"| **{side}** |")))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_differences_are_paired_and_the_best_rival_is_neither_dense_nor_ours(tmp_path: Path) -> None:
    rows = [
        *(_row("dense", s, 90.0 + s, seconds=6.0, curve=[(20, 80.0), (40, 90.0)]) for s in (0, 1)),
        *(
            _row("norm", s, 84.0 + 3 * s, curve=[(10, 89.5), (20, 70.0), (30, 89.2), (40, 90)])
            for s in (0, 1)
        ),
        *(_row("static", s, 80.0) for s in (0, 1)),
        _row("lucky", 0, 99.0),
        *(_row("ours", s, 88.0 + s, curve=[(40, 70.0)]) for s in (0, 1)),
        _row("ours", 1, 87.0, curve=[(40, 70.0)]),
    ]
    Results(tmp_path / "it.jsonl").append(rows)
    text = tables(tmp_path, "it")
    assert "it, 40 steps, 50 % of the FLOPs" in text
    assert _cells(text, "ours")[1:5] == [
        "2", "87.50 [87.00, 88.00]", "-3.00 [-4.00, -2.00]", "+2.00 [+0.00, +4.00]"
    ]  # fmt: skip
    assert _cells(text, "norm")[4] == ""
    assert _cells(text, "norm")[7:9] == ["0.50", "30"]
    assert _cells(text, "ours")[8] == "—"
    assert "static" not in tables(tmp_path, "it", {"dense", "norm", "ours"})


def test_the_time_of_a_run_beside_much_else_does_not_count(tmp_path: Path) -> None:
    rows = [
        _row("dense", 0, 90.0, seconds=6.0),
        _row("ours", 0, 88.0, seconds=3.0),
        _row("ours", 0, 89.0, seconds=9.0, busy=True),
        _row("norm", 0, 87.0, seconds=9.0, busy=True),
    ]
    Results(tmp_path / "it.jsonl").append(rows)
    text = tables(tmp_path, "it")
    assert _cells(text, "ours")[2].startswith("89.00")
    assert [_cells(text, side)[7] for side in ("ours", "norm")] == ["0.50", ""]
    assert "87.00 (—): norm" in summary(tmp_path, ["it"], {"dense", "ours", "norm"})


def test_longer_runs_have_lines_of_their_own_in_the_summary(tmp_path: Path) -> None:
    rows = [
        _row(side, 0, figure + steps / 40, steps=steps)
        for steps in (40, 120)
        for side, figure in (("dense", 90.0), ("ours", 88.0), ("norm", 87.5))
    ]
    Results(tmp_path / "it.jsonl").append(rows)
    lines = summary(tmp_path, ["it"], ("dense", "ours", "norm")).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [(each[0], each[3], each[-1]) for each in cells] == [
        ("it, 50 %", "**89.00 (1.00)**", "+0.50"),
        ("it, 50 % (120 steps)", "**91.00 (1.00)**", "+0.50"),
    ]


def test_of_a_loss_less_is_better(tmp_path: Path) -> None:
    rows = [_row(side, 0, loss, "loss") for side, loss in (("dense", 1.5), ("norm", 1.8), ("static", 2.0))]
    Results(tmp_path / "it.jsonl").append([*rows, _row("ours", 0, 1.7, "loss")])
    text = tables(tmp_path, "it")
    order = [line.split("|")[1].strip() for line in text.splitlines()[4:]]
    assert order == ["dense", "**ours**", "norm", "static"]
    assert _cells(text, "ours")[4] == "-0.100"


def test_a_page_gets_its_tables_between_its_marks() -> None:
    page = "a\n<!-- bench it -->\nold\n<!-- end -->\nb\n<!-- bench other -->\nold\n<!-- end -->\n"
    once = placed(page, {"it": "| new |"})
    assert (
        once
        == "a\n<!-- bench it -->\n\n| new |\n\n<!-- end -->\nb\n<!-- bench other -->\nold\n<!-- end -->\n"
    )
    assert placed(once, {"it": "| new |"}) == once


def test_a_side_that_does_not_run_is_said_and_the_next_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(Side):
        def begin(self, run: Any) -> None:
            raise RuntimeError("shapes do not fit")

    def measured(task: Any, side: Side, name: str, budget: float, seed: int, *rest: Any) -> dict[str, Any]:
        if isinstance(side, Broken):
            side.begin(None)
        return _row(name, seed, 50.0, budget=budget, task=task.name, steps=task.steps)

    monkeypatch.setattr(command, "measured", measured)
    monkeypatch.setitem(command.SIDES, "static mask", Broken)
    asked = [
        "run",
        "graph-gcn",
        "--data",
        str(tmp_path),
        "--results",
        str(tmp_path),
        "--seeds",
        "0",
        "--sides",
    ]
    command.main([*asked, "small from scratch, widths of ours", "static mask", "dense"])
    said = capsys.readouterr().err
    assert "graph-gcn at 0.25: 3 trainings" in said
    assert "needs the widths of ours" in said
    assert "static mask: does not run: RuntimeError: shapes do not fit" in said
    assert [row["side"] for row in Results(tmp_path / "graph-gcn.jsonl").rows()] == ["dense"]
    assert not list((tmp_path / "claims").iterdir())


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the data beside the checkout")
def test_shakespeare_and_cora_are_read_as_they_are_published() -> None:
    text = language(DATA)
    x, y = next(text.batches(0))
    assert x.shape == y.shape == (12, 64)
    assert (x[:, 1:] == y[:, :-1]).all()
    features, source, target, weight = gcn(DATA).example(1)
    assert features.shape == (2708, 1433)
    assert len(source) == len(target) == len(weight) == 10556 + 2708
    model = gcn(DATA).dense(0).eval()
    assert 0 < gcn(DATA).evaluate(model)["accuracy"] < 50
