"""The bench: units by hand are what the package says they are, every side trains, a stopped run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from analysis.bench import main as command
from analysis.bench.allocation import Shape, chosen
from analysis.bench.run import measured
from analysis.bench.sides import SIDES, make
from analysis.bench.task import Task, cosine, warmup_linear
from analysis.bench.units import Units
from controlprune.app.compare import accuracy, count_flops
from controlprune.app.tasks import load, plain_net

STEPS = 24


def _net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return plain_net(1, (16, 32))


def _tiny() -> Task:
    digits = load("digits")

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            rows = torch.randint(len(digits.train[0]), (32,), generator=generator)
            yield digits.train[0][rows], digits.train[1][rows]

    return Task(
        name="tiny",
        steps=STEPS,
        budgets=(0.4,),
        dense=_net,
        blank=_net,
        optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=3e-3),
        batches=batches,
        outputs=lambda model, pair: (model(pair[0]), pair[1]),
        evaluate=lambda model: {"accuracy": 100 * accuracy(model, *digits.test)},
        glance=lambda model: 100 * accuracy(model, *digits.test),
        example=lambda rows: (digits.example(rows),),
        rate=cosine(),
    )


@pytest.mark.parametrize("rate", [warmup_linear(), cosine()])
def test_a_rate_rises_to_one_and_falls_to_nothing(rate: partial[float]) -> None:
    assert rate(0.1) == pytest.approx(1.0)
    assert rate(0.05) == pytest.approx(0.5)
    assert rate(1.0) == pytest.approx(0.0)


def test_gate_gradients_by_hand_are_the_slopes_of_the_loss() -> None:
    task, model = _tiny(), _net(0).eval()
    units = Units(model, None, task.example(4))
    x, y = next(task.batches(0))
    cross_entropy(model(x), y).backward()
    found = units.gate_gradients()[0]
    reader = model.get_parameter("stage2.conv.weight")
    for unit in (0, 7):
        losses = []
        for gate in (1.01, 0.99):
            with torch.no_grad():
                before = reader[:, unit].clone()
                reader[:, unit] *= gate
                losses.append(cross_entropy(model(x), y).item())
                reader[:, unit] = before
        assert found[unit].item() == pytest.approx((losses[0] - losses[1]) / 0.02, rel=0.05, abs=1e-4)


@pytest.mark.parametrize("shape", ["uniform", "per cost", "global"])
def test_a_cut_by_hand_is_inside_the_budget_keeps_the_best_and_counts_as_torch_does(shape: Shape) -> None:
    task, model = _tiny(), _net(0)
    whole = count_flops(model, *task.example(4))
    units = Units(model, torch.optim.Adam(model.parameters()), task.example(4))
    scores = [torch.rand(n) for n in units.sizes]
    units.cut(chosen(units, scores, 0.6, shape))
    units.cut(chosen(units, scores, 0.3, shape))
    assert count_flops(model, *task.example(4)) == pytest.approx(units.share * whole, rel=1e-6)
    assert 0.2 < units.share <= 0.3
    for score, mask in zip(scores, units.masks, strict=True):
        assert mask.all() or score[mask].min() > score[~mask].max()
    assert [len(norm[mask]) for norm, mask in zip(units.norms(), units.masks, strict=True)] == units.widths


@pytest.mark.parametrize("name", list(SIDES))
def test_every_side_trains_to_its_budget(name: str) -> None:
    if name == "Torch-Pruning":
        pytest.importorskip("torch_pruning")
    row = measured(_tiny(), make(name), name, 0.4, 0, lambda step, share: None, found=[9, 12])
    assert row["flops"] == 1.0 if name == "dense" else 0.25 < row["flops"] <= 0.4
    assert row["flops"] - 1e-9 <= row["train_flops"] <= 1.0
    assert row["seconds"] > 0
    assert [step for step, _ in row["curve"]] == list(range(2, STEPS + 1, 2))
    assert row["curve"][-1][1] == pytest.approx(row["accuracy"], abs=1e-3)


def test_what_is_in_the_results_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = _tiny()
    monkeypatch.setitem(command.TASKS, "text", lambda data: task)
    asked = ["run", "text", "--data", str(tmp_path), "--results", str(tmp_path), "--seeds", "0", "--sides"]
    command.main([*asked, "dense", "--dry"])
    assert "1 of 1 trainings left" in capsys.readouterr().err
    command.main([*asked, "dense"])
    command.main([*asked, "dense", "static mask"])
    said = capsys.readouterr().err
    assert "1 of 2 trainings left" in said
    assert len((tmp_path / "tiny.jsonl").read_text().splitlines()) == 2
