"""A task: what is trained, on what, for how long, and the figure at the end. Frozen; everything seeded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

__all__ = ["Example", "Task", "cosine", "warmup_linear"]

Example = Any  # what cp.attach takes as example_inputs: a tuple, or a dict by keyword
Rate = Callable[[float], float]  # progress in [0, 1] -> factor on the learning rate


@dataclass(frozen=True)
class Task:
    """`dense(seed)` is where a user begins: pretrained where there is something pretrained."""

    name: str
    steps: int
    budgets: tuple[float, ...]  # FLOPs of one forward pass of the example, fractions of dense
    dense: Callable[[int], nn.Module]
    blank: Callable[[int], nn.Module]  # the same architecture with random weights
    optimizer: Callable[[nn.Module], Optimizer]
    batches: Callable[[int], Iterator[Any]]
    outputs: Callable[[Callable[..., Any], Any], tuple[Tensor, Tensor]]  # model, batch -> logits, labels
    evaluate: Callable[[nn.Module], Mapping[str, float]]
    example: Callable[[int], Example]  # of so many rows
    figure: str = "accuracy"  # or "loss": then less is better
    glance: Callable[[nn.Module], float] | None = None  # the figure on the way, on a part of what is held out
    rate: Rate = lambda _: 1.0
    reset: bool = True  # layers initialise by fan-in: a small net from scratch is reset at its size
    pretrained: bool = False
    needs: str = ""  # what must be there besides the package

    def loss(self, model: Callable[..., Any], batch: Any) -> Tensor:
        """Cross-entropy over everything that has a label."""
        logits, labels = self.outputs(model, batch)
        return cross_entropy(logits.flatten(0, -2), labels.flatten())


def warmup_linear(warm: float = 0.1) -> Rate:
    """Up to 1 over `warm` of the run, then straight down to 0."""
    return lambda x: min(x / warm, (1.0 - x) / (1.0 - warm)) if warm else 1.0 - x


def cosine(warm: float = 0.1) -> Rate:
    """Up to 1 over `warm` of the run, then half a cosine down to 0."""
    return lambda x: x / warm if x < warm else 0.5 * (1 + math.cos(math.pi * (x - warm) / (1 - warm)))
