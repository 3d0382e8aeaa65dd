"""A side: what is done about the budget during a training loop that is the same for all.

begin      the network and its optimizer are made; the side may replace or prepare them
observe    gradients are there, the optimizer has not run yet
after      the optimizer has run
finish     the run is over: the plain network
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..clock import Clock
from ..task import Example, Task

__all__ = ["Run", "Side"]


@dataclass
class Run:
    """One training under way."""

    task: Task
    budget: float
    seed: int
    model: nn.Module
    optimizer: Optimizer
    clock: Clock
    found: Sequence[int] | None = None  # the widths that ours ended with, at this budget and seed
    shares: list[float] = field(default_factory=list)  # of every step so far: FLOPs, fraction of dense
    curve: list[tuple[int, float]] = field(default_factory=list)  # step, figure on a part of what is held out
    notes: dict[str, Any] = field(default_factory=dict)  # what the side wants to have in the row

    @property
    def example(self) -> Example:
        return self.task.example(8)

    @property
    def steps(self) -> int:
        return self.task.steps


class Side:
    """Dense, unless a subclass does something."""

    def begin(self, run: Run) -> None:
        self.run = run

    def loss(self, model: nn.Module, batch: Any, step: int) -> Tensor:
        return self.run.task.loss(model, batch)

    def observe(self, step: int) -> None: ...

    def after(self, step: int, loss: Tensor) -> None: ...

    @property
    def share(self) -> float:
        """What a forward pass takes now."""
        return 1.0

    @property
    def step_share(self) -> float:
        """What a training step takes now, everything in it: of a dense one."""
        return self.share

    def finish(self) -> nn.Module:
        return self.run.model
