"""Runs that end otherwise than planned: early, without a step, with another horizon, at other weights."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import rig
import torch
from safetensors.torch import load_file, load_model, save_file
from torch.nn.functional import cross_entropy

import controlprune as cp

POLICY = cp.Control(observe_every=1, update_every=4)


def of(total_steps: int) -> rig.Rig:
    return rig.rig(total_steps=total_steps, policy=POLICY)


def flops(run: rig.Rig) -> float:
    return run.controller.cost()["flops"].fraction


# --- an end before the plan is through -------------------------------------------------------------


def test_an_early_end_says_what_it_cut_and_how_long_to_heal(caplog: pytest.LogCaptureFixture) -> None:
    run = of(400)
    run.train(0, 100)  # the cut has begun
    before = flops(run)
    assert 0.5 < before < 1.0
    with caplog.at_level(logging.WARNING, "controlprune"):
        run.controller.finalize()
    after = flops(run)
    assert after <= 0.5
    (record,) = caplog.records
    message = record.getMessage()
    assert "the run ends at step 100 of 400, before the plan was through" in message
    assert f"flops went from {before:.3g} to {after:.3g} of dense at once" in message
    heal = round(0.7 * 400 * (before - after) / (1 - after))  # what the plan leaves, for the whole way
    assert f"about {heal} more training steps let it heal" in message
    assert "controller.total_steps" in message


def test_an_end_after_the_plan_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    run = of(120)
    run.train(0, 90)
    with caplog.at_level(logging.WARNING, "controlprune"):
        run.controller.finalize()
    assert not caplog.records


def test_a_step_that_was_never_called_is_said(caplog: pytest.LogCaptureFixture) -> None:
    run = of(120)
    for step in range(60):
        x, y = rig.batch(step, (8,))
        cross_entropy(run.model(x), y).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    with caplog.at_level(logging.WARNING, "controlprune"):
        run.controller.finalize()
    message = caplog.records[0].getMessage()
    assert "controller.step() was never called, so nothing was observed" in message
    assert "Call controller.step() after every optimizer.step()" in message


def test_a_step_that_was_called_now_and_then_is_said(caplog: pytest.LogCaptureFixture) -> None:
    run = of(120)
    for step in range(120):
        x, y = rig.batch(step, (8,))
        loss = cross_entropy(run.model(x), y)
        loss.backward()
        run.optimizer.step()
        if step % 10 == 0:
            run.controller.step(loss)
        run.optimizer.zero_grad()
    with caplog.at_level(logging.WARNING, "controlprune"):
        run.controller.finalize()
    assert "called 12 times in 120 runs of the optimizer" in caplog.records[0].getMessage()


# --- another horizon -------------------------------------------------------------------------------


def test_a_shorter_horizon_hastens_the_plan(caplog: pytest.LogCaptureFixture) -> None:
    """The cut that would have come later comes now, by the loop, and there is time left to heal."""
    run = of(1000)
    run.train(0, 60)
    assert flops(run) == 1.0
    run.controller.total_steps = 120
    assert run.controller.total_steps == run.controller.history.total_steps == 120
    run.train(60, 84)
    assert flops(run) <= 0.5
    run.train(84, 120)
    with pytest.warns(UserWarning, match="step 121 is past total_steps=120"):
        run.train(120, 121)
    with caplog.at_level(logging.WARNING, "controlprune"):
        run.controller.finalize()
    assert not caplog.records  # nothing was left to cut at the end


def test_a_longer_horizon_goes_on_with_the_plan() -> None:
    run = of(60)
    run.train(0, 12)
    now = flops(run)
    run.controller.total_steps = 600
    run.train(12, 60)
    assert flops(run) == now  # a tenth of the way: the plan waits
    run.train(60, 400)
    assert flops(run) <= 0.5


def test_a_horizon_is_saved_with_the_run() -> None:
    straight, resumed = of(1000), of(1000)
    straight.train(0, 60)
    straight.controller.total_steps = 120
    straight.train(60, 70)
    parts = [straight.controller, straight.model, straight.optimizer]
    states = [copy.deepcopy(part.state_dict()) for part in parts]
    for part, state in zip([resumed.controller, resumed.model, resumed.optimizer], states, strict=True):
        part.load_state_dict(state)
    assert resumed.controller.total_steps == 120
    for run in (straight, resumed):
        run.train(70, 120)
    rows = [rig.timeless([*run.controller.history]) for run in (straight, resumed)]
    assert rows[0] == rows[1]
    rig.assert_same_bits(
        rig.bits(straight.model, straight.optimizer), rig.bits(resumed.model, resumed.optimizer)
    )


def test_the_run_total_of_a_shorter_horizon_is_of_its_steps() -> None:
    run = rig.rig(total_steps=400, policy=POLICY, budget=cp.Budget(train_flops=0.6), shrink_at=60)
    run.train(0, 20)
    run.controller.total_steps = 200
    run.train(20, 200)
    spent = run.controller.cost()["train_flops"]
    assert spent.dense == pytest.approx(200 * 3 * 2 * 2 * (8 * 32 + 32 * 24 + 24 * 4))
    assert 0.5 < spent.fraction <= 0.61


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "many", 19])
def test_a_horizon_that_is_none(steps: object) -> None:
    run = of(60)
    run.train(0, 20)
    with pytest.raises(ValueError, match=r"total_steps=.*: (give the number of training|20 are done)"):
        run.controller.total_steps = steps  # type: ignore[assignment]
    assert run.controller.total_steps == 60


# --- weights of before a cut -----------------------------------------------------------------------


def saved_before_a_cut(folder: Path) -> rig.Rig:
    """A run that shrinks, whose weights and controller were saved on the way, and which went on to cut more.

    The weights are in a safetensors file as a framework writes it: without metadata.
    """
    run = rig.rig(total_steps=120, policy=POLICY)
    run.train(0, 30)
    run.controller.shrink()
    assert 0.5 < flops(run) < 1.0
    save_file({name: value.clone() for name, value in run.model.state_dict().items()}, folder / "model")
    torch.save(run.controller.state_dict(), folder / "controller")
    run.train(30, 90)
    assert flops(run) <= 0.5
    return run


def test_weights_of_before_a_cut_load_where_the_controllers_file_is_beside_them(tmp_path: Path) -> None:
    run = saved_before_a_cut(tmp_path)
    run.controller.load_state_dict(torch.load(tmp_path / "controller", weights_only=True))
    load_model(run.model, tmp_path / "model")
    for name, value in load_file(tmp_path / "model").items():
        assert torch.equal(run.model.state_dict()[name], value)
    run.train(30, 120)
    run.controller.finalize()
    assert flops(run) <= 0.5


def test_without_it_the_error_says_which_and_what_to_load_first(tmp_path: Path) -> None:
    run = saved_before_a_cut(tmp_path)
    before = rig.bits(run.model, run.optimizer)
    with pytest.raises(
        ValueError, match=r"state_dict: 0\.weight has neither .*load the controller's state_dict"
    ):
        run.model.load_state_dict(load_file(tmp_path / "model"))
    rig.assert_same_bits(before, rig.bits(run.model, run.optimizer))
    run.train(90, 120)
