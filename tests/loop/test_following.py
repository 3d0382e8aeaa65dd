"""Averages of the weights follow the model: whenever they were copied, and into a resumed run."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from rig import QUICK, Rig, assert_same_bits, bits, rig
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import controlprune as cp

QUIET = replace(QUICK, looks=0.0)


def average_of(run: Rig) -> AveragedModel:
    return AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)


def train(run: Rig, averaged: AveragedModel, start: int, stop: int) -> None:
    for step in range(start, stop):
        run.train(step, step + 1)
        averaged.update_parameters(run.model)


@pytest.mark.parametrize("net", ["mlp", "residual"])
@pytest.mark.parametrize("layout", ["dense", "masked", "compact"])
def test_a_copy_of_any_moment(net: str, layout: str) -> None:
    """Shapes are the model's from then on, and units that return are the model's own of then."""
    run = rig(net, policy=QUIET)
    run.train(0, 60)
    {"dense": lambda: None, "masked": run.controller.expand, "compact": run.controller.shrink}[layout]()
    averaged = average_of(run)
    run.controller.follow(averaged.module)
    run.controller.shrink()
    train(run, averaged, 60, 80)
    run.controller.expand()
    before = copy.deepcopy(run.controller.masks)
    run.controller.set_masks({name: torch.ones_like(mask) for name, mask in before.items()})
    assert all(bool(mask.all()) for mask in run.controller.masks.values())
    for mine, theirs in zip(run.model.parameters(), averaged.module.parameters(), strict=True):
        assert mine.shape == theirs.shape
        assert (theirs == 0).float().mean() < 0.01, "what was absent came back, too"
    run.controller.set_masks(before)
    train(run, averaged, 80, 120)
    small = run.controller.finalize()
    averaged.update_parameters(small)
    assert [p.shape for p in small.parameters()] == [p.shape for p in averaged.module.parameters()]


@pytest.mark.parametrize("order", ["followed, then loaded", "loaded, then followed"])
@pytest.mark.parametrize("compact", [False, True])
def test_a_resumed_run_goes_on_with_its_average(order: str, compact: bool) -> None:
    """What is parked of it is saved with the controller: bit for bit the run that did not stop."""
    run = rig("residual", policy=QUIET)
    averaged = average_of(run)
    run.controller.follow(averaged.module)
    train(run, averaged, 0, 60)
    if compact:
        run.controller.shrink()
    states = copy.deepcopy([run.controller.state_dict(), *(x.state_dict() for x in (run.model, averaged))])
    state = copy.deepcopy(run.optimizer.state_dict())
    again = rig("residual", policy=QUIET, seed=5)
    other = average_of(again)
    if order.startswith("followed"):
        again.controller.follow(other.module)
    again.controller.load_state_dict(states[0])
    if order.startswith("loaded"):
        other = average_of(again)  # as the model is now
        again.controller.follow(other.module)
    again.model.load_state_dict(states[1])
    other.load_state_dict(states[2])
    again.optimizer.load_state_dict(state)
    ends = []
    for one, its in ((run, averaged), (again, other)):
        train(one, its, 60, 90)
        one.controller.detach()
        ends.append(bits(its.module))
    assert_same_bits(*ends)


def test_saved_followers_that_are_not_there_wait() -> None:
    """Saved again before they were given, they are in the file still."""
    run = rig(policy=QUIET)
    run.controller.follow(copy.deepcopy(run.model))
    run.train(0, 60)
    again = rig(policy=QUIET)
    again.controller.load_state_dict(run.controller.state_dict())
    twice: Any = again.controller.state_dict()
    assert len(twice["followers"]) == 1


def test_what_is_no_copy_is_refused_by_name() -> None:
    run = rig(policy=QUIET)
    run.train(0, 60)
    run.controller.shrink()
    with pytest.raises(ValueError, match="model: it is the attached one; give a copy"):
        run.controller.follow(run.model)
    for wrong in (nn.Linear(3, 4), rig("residual").model):
        with pytest.raises(ValueError, match=r"model: its tensor '.*' (is missing|has shape).*; give a copy"):
            run.controller.follow(wrong)
    smaller = rig(policy=QUIET, budget=cp.Budget(flops=0.3))
    smaller.train(0, 60)
    with pytest.raises(ValueError, match=r"model: its tensor '.*' has shape .*neither dense nor as the"):
        run.controller.follow(smaller.controller.finalize())
    run.train(60, 120)
    run.controller.finalize()
