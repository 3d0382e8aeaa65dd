"""SET and RigL on single weights against an implementation by hand: equal masks at each of 200 steps."""

from __future__ import annotations

import math

import pytest
import torch
from rig import batch
from torch import Tensor, nn

import controlprune as cp

STEPS, EVERY = 200, 10
RATE, MOMENTUM, DECAY, DROP = 0.05, 0.9, 1e-3, 0.3


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4))


class ByHand:
    """Masks multiplied onto the weights in the forward, SGD where they are on, the papers' exchange."""

    def __init__(self, net: nn.Sequential, counts: list[int], kind: str) -> None:
        self.w = [p.detach().clone() for p in net.parameters()]  # w₁ b₁ w₂ b₂ w₃ b₃
        self.v = [torch.zeros_like(w) for w in self.w]
        self.kind, self.random = kind, torch.Generator().manual_seed(0)
        self.masks = []
        for w, n in zip(self.w[::2], counts, strict=True):
            order = torch.rand(w.numel(), generator=self.random).argsort(descending=True, stable=True)
            mask = torch.zeros(w.numel(), dtype=torch.bool).index_fill(0, order[:n], True)
            self.masks.append(mask.view(w.shape))

    def step(self, t: int) -> None:
        x, y = batch(t, (8,))
        masked = [w * m for w, m in zip(self.w[::2], self.masks, strict=True)]
        leaves = [p.clone().requires_grad_() for p in [*masked, *self.w[1::2]]]
        a, b, c, d, e, f = leaves
        h = torch.relu(torch.relu(x @ a.T + d) @ b.T + e)
        grads = torch.autograd.grad(nn.functional.cross_entropy(h @ c.T + f, y), leaves)
        for i, g in enumerate(grads[:3]):
            self._descend(2 * i, g, self.masks[i])
        for i, g in enumerate(grads[3:]):
            self._descend(2 * i + 1, g, torch.ones_like(g, dtype=torch.bool))
        until = STEPS - 1 if self.kind == "set" else 0.75 * STEPS
        if t % EVERY == 0 and t <= until:
            for i, g in enumerate(grads[:3]):
                self._exchange(i, t / STEPS, g)

    def _descend(self, i: int, gradient: Tensor, on: Tensor) -> None:
        w, v = self.w[i], self.v[i]
        v[on] = (MOMENTUM * v + gradient + DECAY * w)[on]
        w[on] -= RATE * v[on]

    def _exchange(self, i: int, progress: float, gradient: Tensor) -> None:
        w, v, mask = self.w[2 * i].flatten(), self.v[2 * i].flatten(), self.masks[i].flatten()
        n, share = int(mask.sum()), DROP
        if self.kind == "set":
            gain = torch.rand(len(mask), generator=self.random)
        else:
            gain, share = gradient.flatten().abs(), DROP / 2 * (1 + math.cos(math.pi * progress / 0.75))
        k = int(share * n)
        on = mask.nonzero().flatten()
        kept = on[w[on].abs().argsort(descending=True)[: n - k]]
        stays = torch.zeros_like(mask).index_fill(0, kept, True)
        off = (~stays).nonzero().flatten()
        grown = off[gain[off].argsort(descending=True)[:k]]
        new = stays.index_fill(0, grown, True)
        fresh = ~(new & mask)  # off, or grown at zero (one that was dropped just now keeps what it has)
        w[fresh], v[fresh] = 0.0, 0.0
        self.masks[i] = new.view(self.masks[i].shape)


@pytest.mark.parametrize("layers", ["uniform", "erk"])
@pytest.mark.parametrize("kind", ["set", "rigl"])
def test_the_same_masks_for_two_hundred_steps(kind: str, layers: str) -> None:
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
    make = cp.SET if kind == "set" else cp.RigL
    controller = cp.attach(
        net,
        optimizer,
        budget=cp.Budget(flops=0.3),
        example_inputs=(torch.zeros(2, 8),),
        total_steps=STEPS,
        policy=make(drop=DROP, update_every=EVERY, layers=layers),  # type: ignore[arg-type]
        granularity="weight",
    )
    hand = ByHand(mlp(), [int(m.sum()) for m in controller.masks.values()], kind)
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
    assert moved > 400
    for i, (p, w) in enumerate(zip(net.parameters(), hand.w, strict=True)):
        w = w if i % 2 else w * hand.masks[i // 2]
        torch.testing.assert_close(p.detach(), w, rtol=1e-3, atol=1e-4)
