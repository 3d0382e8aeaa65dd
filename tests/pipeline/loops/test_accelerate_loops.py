"""Accelerate: attached before or after `prepare`, with accumulation and mixed precision."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import rig
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import controlprune as cp

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations inside the library, as it is imported
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

STEPS, BUDGET = 60, 0.5
X = torch.zeros(2, 8)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Accelerate keeps its state for the whole process."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def attached(model: nn.Module, optimizer: Any, steps: int) -> cp.Controller:
    return cp.attach(
        model,
        optimizer,
        budget=cp.Budget(flops=BUDGET),
        example_inputs=(X,),
        total_steps=steps,
        policy=cp.Control(observe_every=1, update_every=4),
    )


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 3}, {"mixed_precision": "bf16"}])
def test_a_prepared_loop(when: str, options: dict[str, Any]) -> None:
    every = options.get("gradient_accumulation_steps", 1)
    accelerator = Accelerator(cpu=True, **options)
    model = rig.mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    data = [rig.batch(step, (8,)) for step in range(STEPS * every)]
    loader = DataLoader(TensorDataset(*(torch.cat(part) for part in zip(*data, strict=True))), rig.BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, STEPS)
    if when == "before":
        controller = attached(model, optimizer, STEPS * every)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    if when == "after":
        controller = attached(model, optimizer, STEPS * every)
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = cross_entropy(model(x), y)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            controller.step(loss)
            schedule.step()
            optimizer.zero_grad()
    assert controller.skipped == 0
    assert controller.history[-1].realised["flops"] <= BUDGET
    small = controller.finalize()
    plain = accelerator.unwrap_model(small, keep_fp32_wrapper=False)
    assert rig.flops(plain, X) <= BUDGET * rig.flops(rig.mlp(), X)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005)
    cross_entropy(plain(X), torch.zeros(2, dtype=torch.long)).backward()
    optimizer.step()
