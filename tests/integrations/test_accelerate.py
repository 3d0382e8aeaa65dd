"""Accelerate: attached before or after `prepare`; saved and loaded by it in a new process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from rig import batch, mlp
from torch import nn

import controlprune as cp
from controlprune.integrations.accelerate import register

QUICK = cp.Control(update_every=4, observe_every=1)


def attached(model: nn.Module, optimizer: torch.optim.Optimizer) -> cp.Controller:
    return cp.attach(
        model, optimizer, budget=cp.Budget(flops=0.5), example_inputs=(torch.zeros(2, 8),), total_steps=40,
        policy=QUICK,
    )  # fmt: skip


def train(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer,
          controller: cp.Controller, start: int, stop: int) -> None:  # fmt: skip
    for step in range(start, stop):
        torch.manual_seed(step)
        x, y = batch(step, (8,))
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            controller.step(loss)
            optimizer.zero_grad()
        if step == 15:
            controller.shrink()


def run(folder: Path, start: int, stop: int, save_at: int | None) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = mlp()
    made = torch.optim.Adam(model.parameters(), lr=0.01)
    model, optimizer = accelerator.prepare(model, made)
    controller = attached(model, optimizer)
    register(accelerator, controller)
    if start:
        accelerator.load_state(str(folder))
    train(accelerator, model, optimizer, controller, start, save_at or stop)
    if save_at is not None:
        accelerator.save_state(str(folder))
        train(accelerator, model, optimizer, controller, save_at, stop)
    return {k: v.clone() for k, v in controller.finalize().state_dict().items()}


@pytest.mark.parametrize("order", ["before", "after"])
def test_attached_before_or_after_prepare_is_the_same_run(order: str) -> None:
    found = []
    for how in ("after", order):
        torch.manual_seed(0)
        accelerator, model = Accelerator(cpu=True), mlp()
        made = torch.optim.Adam(model.parameters(), lr=0.01)
        controller = attached(model, made) if how == "before" else None
        model, optimizer = accelerator.prepare(model, made)
        controller = controller or attached(model, optimizer)
        train(accelerator, model, optimizer, controller, 0, 40)
        found.append(controller.finalize().state_dict())
    assert all(torch.equal(v, found[1][k]) for k, v in found[0].items())


def test_saved_and_loaded_in_a_new_process(tmp_path: Path) -> None:
    whole = run(tmp_path / "state", 0, 40, save_at=20)
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        f"import torch; from pathlib import Path; from test_accelerate import run\n"
        f"torch.set_num_threads(1)\n"
        f"torch.save(run(Path({str(tmp_path / 'state')!r}), 20, 40, None), {str(tmp_path / 'end.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
    again = torch.load(tmp_path / "end.pt", weights_only=True)
    assert {k: v.shape for k, v in whole.items()} == {k: v.shape for k, v in again.items()}
    assert all(torch.equal(v, again[k]) for k, v in whole.items())
