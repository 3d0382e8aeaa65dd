"""SET and RigL by hand: what the tests of channels and of weights share."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from rig import batch
from torch import Tensor, nn
from torch.optim import SGD

import controlprune as cp

STEPS, EVERY = 200, 10
RATE, MOMENTUM, DECAY, DROP = 0.05, 0.9, 1e-3, 0.3


class Hand(Protocol):
    masks: list[Tensor]

    def step(self, t: int) -> None: ...


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4))


def random_mask(size: int, on: int, random: torch.Generator) -> Tensor:
    order = torch.rand(size, generator=random).argsort(descending=True, stable=True)
    return torch.zeros(size, dtype=torch.bool).index_fill(0, order[:on], True)


def descended(w: Tensor, v: Tensor, gradient: Tensor, on: Tensor) -> None:
    """A step of SGD with momentum and decay, in place, where `on`."""
    v[on] = (MOMENTUM * v + gradient + DECAY * w)[on]
    w[on] -= RATE * v[on]


def share(kind: str, progress: float) -> float:
    """Of what is on that is exchanged."""
    return DROP if kind == "set" else DROP / 2 * (1 + math.cos(math.pi * progress / 0.75))


def exchanged(mask: Tensor, kept: Tensor, gain: Tensor, part: float) -> Tensor:
    """The least by `kept` go, as many of most `gain` come."""
    n = int(mask.sum())
    k = int(part * n)
    on = mask.nonzero().flatten()
    stays = torch.zeros_like(mask).index_fill(0, on[kept[on].argsort(descending=True)[: n - k]], True)
    off = (~stays).nonzero().flatten()
    return stays.index_fill(0, off[gain[off].argsort(descending=True)[:k]], True)


def follow(net: nn.Module, optimizer: SGD, controller: cp.Controller, hand: Hand) -> int:
    """Both train; equal masks at every step. How many units were exchanged?"""
    moved = 0
    for t in range(1, STEPS + 1):
        for ours, theirs in zip(controller.masks.values(), hand.masks, strict=True):
            assert torch.equal(ours, theirs.flatten()), t
        before = torch.cat([m.flatten() for m in hand.masks])
        x, y = batch(t, (8,))
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
        hand.step(t)
        moved += int((before != torch.cat([m.flatten() for m in hand.masks])).sum())
    return moved
