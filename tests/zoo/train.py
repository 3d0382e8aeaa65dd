"""One model through a whole run: trained under a budget, made small, saved, loaded, with equal output.

budget      flops = least + SHARE · (1 − least), in the middle of what can be reached
training    STEPS steps of AdamW in training mode on the example inputs; the loss is the mean square of the
            outputs, as good as any where only the loop is looked at
small       used ≤ budget, counted by the controller; it trains on
reloaded    ‖loaded − small‖∞ / ‖small‖∞ in eval mode, on a fresh model of the same class; and that of what
            was masked against what is finalized, where `finalize` changes no mask
"""

from __future__ import annotations

import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import controlprune as cp

from .check import call, error, limited
from .parts import Factory, Inputs

__all__ = ["Trained", "train"]

STEPS, SHARE = 48, 0.4
TOLERANCE = (
    1e-5  # of the reloaded output: the memory's order may be another, and a kernel's roundings with it
)
NOTHING = ("can be pruned", "has units to prune", "no residual branch")  # in errors that say so


@dataclass(frozen=True)
class Trained:
    """What a run showed. `status` is "small", "refused" (nothing in it is prunable), "WRONG" or "error"."""

    budget: float = 1.0  # of dense
    used: float = 1.0
    observed: int = 0  # updates on which something was known
    different: float = 0.0  # of the reloaded model
    prunable: bool = True
    seconds: float = 0.0
    failure: str = ""

    @property
    def status(self) -> str:
        if self.failure:
            return "error"
        if not self.prunable:
            return "refused"
        met = self.used <= self.budget * (1 + 1e-9) and self.observed > 0 and self.different <= TOLERANCE
        return "small" if met else "WRONG"


def train(factory: Factory, seed: int = 0, seconds: int = 120, granularity: str = "channel") -> Trained:
    """A run on a fresh model; what is raised is part of the result."""
    began = time.process_time()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it gives other roundings than the layers it stands for
    try:
        with limited(seconds):
            torch.manual_seed(seed)
            return _trained(factory, began, granularity)
    except Exception as raised:
        frames = traceback.extract_tb(raised.__traceback__)
        where = " < ".join(f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in reversed(frames[-4:]))
        lines = str(raised).strip().splitlines()[:1]
        return Trained(failure=f"{type(raised).__name__} at {where}: {lines}")
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _trained(factory: Factory, began: float, granularity: str) -> Trained:
    model, inputs = factory()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    try:
        example = cp.trace(model, inputs) if granularity == "channel" else inputs
        model.train()
        budget = _reachable(model, optimizer, example, granularity)
    except ValueError as reason:
        if not any(said in str(reason) for said in NOTHING):
            raise
        return Trained(prunable=False, seconds=time.process_time() - began)
    controller = cp.attach(
        model,
        optimizer,
        budget=cp.Budget(flops=budget),
        example_inputs=example,
        total_steps=STEPS,
        granularity=granularity,
    )
    for step in range(STEPS):
        loss = _loss(call(model, inputs, seed=step))
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
    observed, use = len(controller.history), controller.cost()["flops"].fraction
    masks, masked = controller.masks, _evaluated(model, inputs)
    small = controller.finalize()
    use = max(use, controller.cost()["flops"].fraction)
    different = _reloaded(controller, small, factory, inputs)
    if all(torch.equal(mask, controller.masks[name]) for name, mask in masks.items()):
        different = max(different, error(masked, _evaluated(small, inputs)))
    _loss(call(small.train(), inputs)).backward()
    optimizer.step()
    return Trained(budget, use, observed, different, seconds=time.process_time() - began)


def _reachable(model: nn.Module, optimizer: torch.optim.Optimizer, example: Any, granularity: str) -> float:
    try:
        cp.attach(
            model,
            optimizer,
            budget=cp.Budget(flops=1e-9),
            example_inputs=example,
            total_steps=1,
            granularity=granularity,
        )
    except cp.InfeasibleBudget as reason:
        least, dense = reason.ranges["flops"]
        return least / dense + SHARE * (1 - least / dense)
    raise AssertionError("a billionth of the dense FLOPs is no budget that can be met")


def _loss(outputs: list[Tensor]) -> Tensor:
    parts = [leaf.abs().float().square().mean() for leaf in outputs if leaf.requires_grad]
    return torch.stack(parts).sum()


def _reloaded(controller: cp.Controller, small: nn.Module, factory: Factory, inputs: Inputs) -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.safetensors"
        cp.save(controller, path)
        loaded = cp.load(path, factory()[0])
    return error(_evaluated(small, inputs), _evaluated(loaded, inputs))


def _evaluated(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    training = model.training
    with torch.no_grad():
        found = call(model.eval(), inputs)
    model.train(training)
    return found
