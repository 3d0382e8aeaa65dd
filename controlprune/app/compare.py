"""Sides of a comparison: the same data in the same order, timed fairly, measured alike.

Cores are shared and their speed drifts, so sides are trained in turn, a chunk of steps each, and
compared by the ratio of what they used (process CPU time, not the clock on the wall)::

    ratio(a, b) = Σ_chunks seconds_a / Σ_chunks seconds_b        (A B A B …)

FLOPs are torch's own FlopCounterMode on one forward pass (a multiply-add is 2), attention's fused fast
path, which it cannot see, switched off.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from ..plant.plant import Plant
from ..structure.groups import Structure
from ..structure.untouched import seeded

__all__ = [
    "Side",
    "accuracy",
    "batches",
    "count_flops",
    "count_parameters",
    "fresh",
    "latencies",
    "ratio",
    "train",
]

Batch = tuple[Tensor, Tensor]


@dataclass
class Side:
    """One model in training. `after` runs after every optimizer step, as a user's new line would."""

    model: nn.Module
    optimizer: Optimizer
    batches: Iterator[Batch]
    after: Callable[[Tensor], None] | None = None
    steps: int = 0
    chunks: list[float] = field(default_factory=list)  # CPU seconds of each turn

    @property
    def seconds(self) -> float:
        return sum(self.chunks)

    def advance(self, steps: int) -> float:
        """Train for some steps; the mean loss over them."""
        total = torch.zeros(())
        self.model.train()
        began = time.process_time()
        for _ in range(steps):
            x, y = next(self.batches)
            loss = cross_entropy(self.model(x), y)
            loss.backward()
            self.optimizer.step()
            if self.after is not None:
                self.after(loss)
            self.optimizer.zero_grad()
            total += loss.detach()
        self.chunks.append(time.process_time() - began)
        self.steps += steps
        return float(total) / steps


def train(
    sides: Sequence[Side],
    steps: int,
    chunk: int = 20,
    progress: Callable[[int, Sequence[float]], None] | None = None,
) -> None:
    """Train all sides for `steps` more, in turn, `chunk` each; `progress(steps, losses)` after each turn."""
    left = steps
    while left > 0:
        turn = min(chunk, left)
        losses = [side.advance(turn) for side in sides]
        left -= turn
        if progress is not None:
            progress(turn, losses)


def ratio(side: Side, other: Side) -> float:
    """CPU time of `side` over that of `other`, over the turns both took (the first ones)."""
    turns = min(len(side.chunks), len(other.chunks))
    return sum(side.chunks[:turns]) / sum(other.chunks[:turns])


def batches(x: Tensor, y: Tensor, batch: int, seed: int) -> Iterator[Batch]:
    """Whole batches of shuffled epochs without end; the same seed gives the same order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(x), generator=generator)
        for rows in order[: len(order) - len(order) % batch].split(batch):
            yield x[rows], y[rows]


def fresh(
    factory: Callable[[], nn.Module], structure: Structure, widths: Sequence[int], seed: int
) -> nn.Module:
    """The model built anew at the given widths, initialised as its own layers do at that size.

    Built dense under `seed`, cut to the first n units of each group, then every module with a
    `reset_parameters` is reset, so that fan-in is that of the small layer. Parameters outside such
    modules keep the dense values they were cut from.
    """
    with seeded(seed):
        model = factory()
        plant = Plant(model, None, structure)
        masks = [torch.arange(n) < width for n, width in zip(structure.sizes, widths, strict=True)]
        plant.apply(masks, compact=True)
        plant.harden()
        for module in model.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    return model


def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch: int = 1000) -> float:
    """Share of examples whose largest output is the label, in eval mode."""
    with _evaluating(model):
        hits = sum(
            int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(batch), y.split(batch), strict=True)
        )
    return hits / len(x)


def count_flops(model: nn.Module, *inputs: Tensor) -> int:
    """FLOPs of one forward pass, in eval mode."""
    counter = FlopCounterMode(display=False)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with _evaluating(model), counter:
            model(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def latencies(models: Sequence[nn.Module], inputs: Tensor, rounds: int = 50) -> list[float]:
    """Median CPU seconds of one forward pass in eval mode, the models taking turns."""
    times: list[list[float]] = [[] for _ in models]
    for turn in range(rounds + 5):  # the first few warm caches up
        for model, record in zip(models, times, strict=True):
            with _evaluating(model):
                began = time.process_time()
                model(inputs)
                if turn >= 5:
                    record.append(time.process_time() - began)
    return [median(record) for record in times]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's mode is put back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
