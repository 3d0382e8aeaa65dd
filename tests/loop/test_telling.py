"""What a run tells people: numbers that agree with the record, one line, few log records."""

from __future__ import annotations

import io
import itertools
import logging
import math

import pytest
import torch
from rig import rig
from runs import made_up_run
from torch import nn

import controlprune as cp
from controlprune.loop.telling import Progress, inside, line, numbers, saved_share


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_metrics_are_flat_finite_and_those_of_the_last_row() -> None:
    run = rig(total_steps=40)
    assert all(math.isfinite(v) for v in run.controller.metrics().values())
    run.train(0, 40)
    found, row = run.controller.metrics(), run.controller.history[-1]
    assert found["flops/use"] == row.realised["flops"]
    assert found["flops/budget"] == 0.5
    assert found["units/active"] == sum(row.active) / sum(run.controller.history.sizes)
    assert all(type(v) is float and math.isfinite(v) for v in found.values())


def test_listeners_hear_every_update_until_they_leave() -> None:
    run = rig(total_steps=60)
    heard: list[int] = []
    leave = run.controller.on_update(lambda controller: heard.append(controller.history[-1].step))
    run.train(0, 30)
    assert heard == [row.step for row in run.controller.history if row.step > 0]
    leave()
    run.train(30, 60)
    assert max(heard) <= 30
    run.controller.finalize()


def test_repr_says_budget_use_step_and_groups() -> None:
    run = rig(total_steps=20)
    run.train(0, 20)
    said = repr(run.controller)
    assert "step 20/20" in said
    assert "budget 50 %" in said
    assert "2 groups" in said
    run.controller.finalize()
    assert "ended" in repr(run.controller)


def test_what_is_saved_counts_shrunk_steps_only() -> None:
    history = made_up_run()
    rows = list(history)
    expected, dense = 0.0, history.sizes
    for row, after in itertools.pairwise(rows):
        expected += (0.0 if row.widths == dense else 1 - row.realised["flops"]) * (after.step - row.step)
    assert saved_share(history) == pytest.approx(expected / rows[-1].step)
    masked = rig(total_steps=30, policy=cp.Control(shrink=False, update_every=4))
    masked.train(0, 30)
    assert numbers(masked.controller.history)["flops/saved"] == 0.0


def test_names_are_shown_as_text() -> None:
    """They may hold what a terminal obeys."""
    model = nn.Sequential()
    for name, part in (("\x1b[2Jup", nn.Linear(8, 16)), ("act", nn.ReLU()), ("down\u202e", nn.Linear(16, 4))):
        model.add_module(name, part)
    controller = cp.attach(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        budget=cp.Budget(flops=0.5),
        example_inputs=(torch.zeros(2, 8),),
        total_steps=10,
    )
    assert controller.groups[0].name == "\x1b[2Jup", "in data as it is"
    told = controller.report() + repr(controller)
    assert r"\x1b[2Jup: 16 of 16" in told
    assert all(c.isprintable() or c == "\n" for c in told)
    controller.detach()
    with pytest.raises(ValueError, match=r"nothing in .* can be pruned") as caught:
        cp.attach(
            nn.Sequential(model[-1]),
            torch.optim.SGD(model[-1].parameters(), lr=0.1),
            budget=cp.Budget(flops=0.5),
            example_inputs=(torch.zeros(2, 16),),
            total_steps=10,
        )
    assert "\u202e" not in str(caught.value)


def test_the_log_has_what_matters_and_not_more(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "controlprune")
    run = rig(total_steps=80, shrink_at=60)
    run.train(0, 80)
    run.controller.finalize()
    said = [record.getMessage() for record in caplog.records]
    for part in ("attached: 2 groups of 56 units, 1 refused; flops can go to", "cut: ", "shrunk: ",
                 "budget met", "finalize: step 80/80"):  # fmt: skip
        assert any(part in message for message in said), part
    assert len(said) < len(run.controller.history)


def test_the_progress_line_is_rewritten_on_a_terminal_and_rare_elsewhere(
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = cp.attach(
        model, optimizer, budget=cp.Budget(flops=0.5), example_inputs=(torch.zeros(2, 8),), total_steps=40,
        progress=True,
    )  # fmt: skip
    for _ in range(40):
        loss = model(torch.randn(8, 8)).square().mean()
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
    controller.finalize()
    shown = capsys.readouterr().err.splitlines()
    assert 2 <= len(shown) <= 12
    assert "budget 50 %" in shown[-1]

    terminal, history = Terminal(), made_up_run()
    history.append(history[-1])
    Progress(terminal)(controller)
    assert terminal.getvalue() == f"\r\033[K{line(controller.history)}\n"
    assert inside(controller.history)
