"""The clock's study: what a controller holds, and a summary that can be resumed."""

from __future__ import annotations

import pytest
import torch
from nets import WORKLOADS

import controlprune as cp
from analysis import speed

EAGER = cp.Control(observe_every=1, update_every=1)  # fills all memories soon


@pytest.mark.parametrize("name", ["cnn", "gpt"])
def test_a_controller_holds_little_beside_the_parameters(name: str) -> None:
    work = WORKLOADS[name]
    x, y = (t[:4] for t in work.batch())
    model = work.build(work.dense)
    optimizer = torch.optim.Adam(model.parameters())
    controller = cp.attach(
        model, optimizer, budget=cp.Budget(flops=1.0), example_inputs=(x,), total_steps=40, policy=EAGER
    )
    for _ in range(20):
        loss = work.loss(model, x, y)
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
    share = speed.extra_bytes(controller) / speed.size_in_bytes(list(model.parameters()))
    assert 0.005 < share <= 0.021  # of it half are rows that wait to be read together (loop/intake.py)
