"""Task 4: a GPT of 4 layers, width 128, 64 characters of context, on tiny Shakespeare, from scratch.

The last tenth of the text is held out; the figure is the mean loss (nats a character) on 512 windows of it,
the same ones always. AdamW, cosine with warm-up. 2,000 steps of 12 windows at a rate of 1e-3 give a published
1.88 (nanoGPT); 400 are made here.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...nets import WORKLOADS
from ..task import Task, cosine

__all__ = ["language"]

CONTEXT, HELD_OUT = 64, 512
Windows = tuple[Tensor, Tensor]


def language(data: Path, steps: int = 400, batch: int = 12, rate: float = 2e-3) -> Task:
    file = data / "tinyshakespeare" / "input.txt"
    return Task(
        name="language",
        steps=steps,
        budgets=(0.5, 0.25),
        dense=_net,
        blank=_net,
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1),
        batches=lambda seed: _batches(_text(file)[0], batch, seed),
        outputs=lambda model, pair: (model(pair[0]), pair[1]),
        evaluate=lambda model: {"loss": _held_out(model, file, HELD_OUT)},
        example=lambda rows: (_windows(_text(file)[0], torch.arange(rows) * CONTEXT)[0],),
        figure="loss",
        glance=lambda model: _held_out(model, file, HELD_OUT // 4),
        rate=cosine(),
    )


def _net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    gpt = WORKLOADS["gpt"]
    return gpt.build(gpt.dense)


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model(x).flatten(0, -2), y.flatten())


def _batches(text: Tensor, batch: int, seed: int) -> Iterator[Windows]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield _windows(text, torch.randint(len(text) - CONTEXT - 1, (batch,), generator=generator))


def _windows(text: Tensor, starts: Tensor) -> Windows:
    at = starts[:, None] + torch.arange(CONTEXT)
    return text[at], text[at + 1]


def _held_out(model: nn.Module, file: Path, windows: int) -> float:
    text = _text(file)[1]
    starts = torch.linspace(0, len(text) - CONTEXT - 2, windows).long()
    with torch.no_grad():
        losses = [_loss(model, *_windows(text, part)) for part in starts.split(64)]
    return float(torch.stack(losses).mean())


@cache
def _text(file: Path) -> tuple[Tensor, Tensor]:
    """Characters as numbers: nine tenths, and the last one."""
    read = file.read_text(encoding="utf-8")
    number = {character: i for i, character in enumerate(sorted(set(read)))}
    text = torch.tensor([number[character] for character in read])
    return text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
