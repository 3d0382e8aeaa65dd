"""Ends that nobody planned: a controller that is dropped, copied, or whose loss tensor is used again."""

from __future__ import annotations

import copy
import logging
import pickle
from dataclasses import replace

import pytest
import torch
from rig import QUICK, assert_same_bits, batch, bits, hooks, rig, timeless
from torch import nn

MASKED = replace(QUICK, shrink=False)


@pytest.mark.parametrize("compact", [False, True])
def test_a_controller_that_is_dropped_leaves_a_dense_model(
    compact: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """At once, not when the garbage collector comes by: amid a forward shapes must not change."""
    runs = [rig(policy=MASKED) for _ in range(2)]
    for run in runs:
        run.train(0, 60)
        if compact:
            run.controller.shrink()
    assert any(not mask.all() for mask in run.controller.masks.values())
    expected = runs[0].controller.detach()
    model, optimizer = run.model, run.optimizer
    with caplog.at_level(logging.WARNING, "controlprune"):
        runs.clear()
        del run
    assert "dropped without finalize() or detach()" in caplog.text
    assert_same_bits(bits(expected), bits(model))
    assert hooks(model, optimizer) == 0
    x, y = batch(0, (8,))
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def test_a_controller_that_has_ended_is_dropped_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    run = rig(policy=MASKED)
    run.train(0, 60)
    small = run.controller.finalize()
    before = bits(small, run.optimizer)
    optimizer = run.optimizer
    del run
    assert caplog.text == ""
    assert_same_bits(before, bits(small, optimizer))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_controller_cannot_be_copied(copied: object) -> None:
    run = rig()
    before = bits(run.model, run.optimizer)
    with pytest.raises(TypeError, match=r"controller: .* cannot be copied or pickled; keep its state_dict"):
        copied(run.controller)  # type: ignore[operator]
    with pytest.raises(TypeError, match="controller: "):
        copied(
            (run.model, run.optimizer, run.controller)[::-1] if copied is not copy.copy else run.controller
        )  # type: ignore[operator]
    assert_same_bits(before, bits(run.model, run.optimizer))
    run.train(0, 8)


@pytest.mark.parametrize("compact", [False, True])
def test_copies_of_model_and_optimizer_are_plain(compact: bool) -> None:
    """What the copies do is nothing to the originals, and the other way round."""
    run = rig(policy=MASKED)
    run.train(0, 60)
    if compact:
        run.controller.shrink()
    model, optimizer = copy.deepcopy((run.model, run.optimizer))
    before = bits(run.model, run.optimizer)
    x, y = batch(0, (8,))
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert_same_bits(before, bits(run.model, run.optimizer))
    before = bits(model, optimizer)
    run.train(60, 80)
    assert_same_bits(before, bits(model, optimizer))


def test_a_loss_tensor_that_is_used_again() -> None:
    """Its value counts as it was in `step`."""
    ends = []
    for again in (False, True):
        run = rig(policy=replace(QUICK, observe_every=3))
        for step in range(40):
            loss = run.train(step, step + 1)
            if again:
                with torch.no_grad():
                    loss.fill_(-7.0)
        run.controller.sync()
        ends.append(timeless(list(run.controller.history)))
    assert ends[0] == ends[1]
