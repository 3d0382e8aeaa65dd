"""SET and RigL against an implementation by hand: equal masks at each of 200 steps, and weights."""

from __future__ import annotations

import math

import pytest
import torch
from rig import batch
from torch import Tensor, nn

import controlprune as cp

STEPS, EVERY = 200, 10
RATE, MOMENTUM, DECAY = 0.05, 0.9, 1e-3
DROP = 0.3


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4))


class ByHand:
    """Dense weights, gates multiplied onto the hidden layers, SGD entry by entry where both ends are on."""

    def __init__(self, net: nn.Sequential, widths: list[int], kind: str) -> None:
        self.w = [p.detach().clone() for p in net.parameters()]  # w₁ b₁ w₂ b₂ w₃ b₃
        self.v = [torch.zeros_like(w) for w in self.w]
        self.kind, self.random = kind, torch.Generator().manual_seed(0)
        self.masks = []
        for size, width in zip((32, 24), widths, strict=True):
            order = torch.rand(size, generator=self.random).argsort(descending=True, stable=True)
            self.masks.append(torch.zeros(size, dtype=torch.bool).index_fill(0, order[:width], True))

    def step(self, t: int) -> None:
        x, y = batch(t, (8,))
        w = [p.clone().requires_grad_() for p in self.w]
        gates = [m.float().requires_grad_() for m in self.masks]
        h = torch.relu(x @ w[0].T + w[1]) * gates[0]
        h = torch.relu(h @ w[2].T + w[3]) * gates[1]
        loss = nn.functional.cross_entropy(h @ w[4].T + w[5], y)
        grads = torch.autograd.grad(loss, [*w, *gates])
        for p, v, g, live in zip(self.w, self.v, grads, self._live(), strict=False):
            v[live] = (MOMENTUM * v + g + DECAY * p)[live]
            p[live] -= RATE * v[live]
        until = STEPS if self.kind == "set" else 0.75 * STEPS
        if t % EVERY == 0 and t <= until:
            self._exchange(t / STEPS, grads[6:])

    def _live(self) -> list[Tensor]:
        a, b = self.masks
        one = torch.ones(8, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
        return [a[:, None] & one[0], a, b[:, None] & a, b, one[1][:, None] & b, one[1]]

    def _exchange(self, progress: float, gradients: tuple[Tensor, ...]) -> None:
        rows = (self.masks[1], torch.ones(4, dtype=torch.bool))
        new = []
        for mask, w, live, gradient in zip(self.masks, self.w[2::2], rows, gradients, strict=True):
            norm = (w[live] ** 2).sum(0)
            n, share = int(mask.sum()), DROP
            if self.kind == "set":
                gain = torch.rand(len(mask), generator=self.random)
            else:
                gain, share = gradient.abs(), DROP / 2 * (1 + math.cos(math.pi * progress / 0.75))
            k = int(share * n)
            on = mask.nonzero().flatten()
            kept = on[norm[on].argsort(descending=True)[: n - k]]
            mask = torch.zeros_like(mask).index_fill(0, kept, True)
            off = (~mask).nonzero().flatten()
            grown = off[gain[off].argsort(descending=True)[:k]]
            new.append(mask.index_fill(0, grown, True))
        self.masks = new


@pytest.mark.parametrize("kind", ["set", "rigl"])
def test_the_same_masks_for_two_hundred_steps(kind: str) -> None:
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
    reference = mlp()
    controller = cp.attach(
        net,
        optimizer,
        budget=cp.Budget(flops=0.4),
        example_inputs=(torch.zeros(2, 8),),
        total_steps=STEPS,
        policy=cp.SET(drop=DROP, update_every=EVERY)
        if kind == "set"
        else cp.RigL(drop=DROP, update_every=EVERY),
    )
    hand = ByHand(reference, [int(m.sum()) for m in controller.masks.values()], kind)
    moved = 0
    for t in range(1, STEPS + 1):
        for ours, theirs in zip(controller.masks.values(), hand.masks, strict=True):
            assert torch.equal(ours, theirs), t
        before = torch.cat(hand.masks)
        x, y = batch(t, (8,))
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
        hand.step(t)
        moved += int((before != torch.cat(hand.masks)).sum())
    assert moved > 40
    controller.detach()
    for ours, theirs in zip(net.parameters(), hand.w, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-3, atol=1e-4)
