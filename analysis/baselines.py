"""The sides every saving is shown beside, all on the same data in the same order for the same steps.

- **dense**: the network as it is.
- **controlled**: `controlprune.attach` with the budget.
- **controlled, started small**: the same, beginning at the uniform allocation of the budget.
- **uniform from scratch**: the same fraction of every group, trained from the start.
- **static**: a random choice of that many units of the dense network, cut at step 0 (dense initialisation).
- **after**: dense for two thirds of the steps, the units of largest readers kept, fine-tuned for the rest.
- **same from scratch**: the widths the controlled one ended with, trained from the start. It can only be
  built afterwards, and so trains beside a second dense run for the ratio of their times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from controlprune.allocate.uniform import uniform
from controlprune.app.compare import Side, batches, fresh
from controlprune.app.tasks import Task
from controlprune.budget import Budget
from controlprune.cost.flops import flops
from controlprune.cost.grid import width_steps
from controlprune.loop.attach import attach
from controlprune.loop.controller import Controller
from controlprune.plant.plant import Plant
from controlprune.policies.base import Policy
from controlprune.structure import analyse
from controlprune.structure.groups import Structure

__all__ = ["after", "controlled", "dense", "from_scratch", "static", "structure_of", "top", "uniform_widths"]

CUT_AT = 2 / 3  # of the run, for "after"


def dense(task: Task, seed: int) -> Side:
    return _side(_model(task, seed), task, seed)


def controlled(
    task: Task,
    seed: int,
    budget: float | Budget,
    steps: int,
    policy: Policy | None = None,
    round_to: int | None = None,
) -> tuple[Side, Controller]:
    """The side, and its controller, still to be finalized. A budget that is a number is one of FLOPs."""
    side = dense(task, seed)
    controller = attach(
        side.model,
        side.optimizer,
        budget=budget if isinstance(budget, Budget) else Budget(flops=budget),
        example_inputs=(task.example(8),),
        total_steps=steps,
        policy=policy,
        round_to=round_to,
        seed=seed,
    )
    side.after = controller.step
    return side, controller


def from_scratch(task: Task, seed: int, structure: Structure, widths: Sequence[int]) -> Side:
    return _side(fresh(task.factory, structure, widths, seed), task, seed)


def static(task: Task, seed: int, structure: Structure, widths: Sequence[int]) -> Side:
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(n, generator=generator) for n in structure.sizes]
    side = dense(task, seed)
    _cut(side, structure, scores, widths)
    return side


def after(task: Task, seed: int, structure: Structure, widths: Sequence[int], steps: int) -> Side:
    """The cut falls after step `CUT_AT · steps`; its time counts."""
    side = dense(task, seed)
    side.after = _Countdown(round(CUT_AT * steps), lambda: _cut(side, structure, None, widths))
    return side


def structure_of(task: Task) -> Structure:
    return analyse(_model(task, 0), (task.example(8),))


def uniform_widths(structure: Structure, budget: float) -> tuple[int, ...]:
    """The largest common fraction of every group inside the FLOPs budget, in the controller's width steps."""
    cost, steps = flops(structure), width_steps(structure.sizes, None)
    return uniform(structure.sizes, [cost], [budget * cost.value(structure.sizes)], steps, steps)


class _Countdown:
    """Does something once, after so many calls."""

    def __init__(self, calls: int, action: Callable[[], None]) -> None:
        self.left, self.action = calls, action

    def __call__(self, _: Tensor) -> None:
        self.left -= 1
        if self.left == 0:
            self.action()


def _model(task: Task, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return task.factory()


def _side(model: nn.Module, task: Task, seed: int) -> Side:
    optimizer = torch.optim.Adam(model.parameters(), lr=task.learning_rate)
    return Side(model, optimizer, batches(*task.train, task.batch, seed))


def _cut(side: Side, structure: Structure, scores: Sequence[Tensor] | None, widths: Sequence[int]) -> None:
    """Keep the units of highest score (default: norm of their readers), for good."""
    plant = Plant(side.model, side.optimizer, structure)
    chosen = plant.weight_norms() if scores is None else scores
    plant.apply([top(score, width) for score, width in zip(chosen, widths, strict=True)], compact=True)
    plant.harden()


def top(score: Tensor, width: int) -> Tensor:
    """The mask of the units of highest score."""
    mask = torch.zeros(len(score), dtype=torch.bool)
    mask[score.topk(width).indices] = True
    return mask
