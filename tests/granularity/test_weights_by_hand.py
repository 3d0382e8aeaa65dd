"""SET and RigL on single weights against an implementation by hand: equal masks at each of 200 steps."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from exchanges import (
    DECAY,
    DROP,
    EVERY,
    MOMENTUM,
    RATE,
    STEPS,
    descended,
    exchanged,
    follow,
    mlp,
    random_mask,
    share,
)
from rig import batch
from torch import Tensor, nn

import controlprune as cp


class ByHand:
    """Masks multiplied onto the weights in the forward, SGD where they are on, the papers' exchange."""

    def __init__(self, net: nn.Sequential, counts: list[int], kind: str) -> None:
        self.w = [p.detach().clone() for p in net.parameters()]  # w₁ b₁ w₂ b₂ w₃ b₃
        self.v = [torch.zeros_like(w) for w in self.w]
        self.kind, self.random = kind, torch.Generator().manual_seed(0)
        pairs = zip(self.w[::2], counts, strict=True)
        self.masks = [random_mask(w.numel(), n, self.random).view(w.shape) for w, n in pairs]

    def step(self, t: int) -> None:
        x, y = batch(t, (8,))
        masked = [w * m for w, m in zip(self.w[::2], self.masks, strict=True)]
        leaves = [p.clone().requires_grad_() for p in [*masked, *self.w[1::2]]]
        a, b, c, d, e, f = leaves
        h = torch.relu(torch.relu(x @ a.T + d) @ b.T + e)
        grads = torch.autograd.grad(nn.functional.cross_entropy(h @ c.T + f, y), leaves)
        for i, g in enumerate(grads[:3]):
            descended(self.w[2 * i], self.v[2 * i], g, self.masks[i])
        for i, g in enumerate(grads[3:]):
            descended(self.w[2 * i + 1], self.v[2 * i + 1], g, torch.ones_like(g, dtype=torch.bool))
        until = STEPS - 1 if self.kind == "set" else 0.75 * STEPS
        if t % EVERY == 0 and t <= until:
            for i, g in enumerate(grads[:3]):
                self._exchange(i, t / STEPS, g)

    def _exchange(self, i: int, progress: float, gradient: Tensor) -> None:
        w, v, mask = self.w[2 * i].flatten(), self.v[2 * i].flatten(), self.masks[i].flatten()
        gain = gradient.flatten().abs()
        if self.kind == "set":
            gain = torch.rand(len(mask), generator=self.random)
        new = exchanged(mask, w.abs(), gain, share(self.kind, progress))
        fresh = ~(new & mask)  # off, or grown at zero (one that was dropped just now keeps what it has)
        w[fresh], v[fresh] = 0.0, 0.0
        self.masks[i] = new.view(self.masks[i].shape)


@pytest.mark.parametrize("layers", ["uniform", "erk"])
@pytest.mark.parametrize(("kind", "make"), [("set", cp.SET), ("rigl", cp.RigL)])
def test_the_same_masks_for_two_hundred_steps(
    kind: str, make: type[cp.SET | cp.RigL], layers: Literal["uniform", "erk"]
) -> None:
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
    controller = cp.attach(
        net,
        optimizer,
        budget=cp.Budget(flops=0.3),
        example_inputs=(torch.zeros(2, 8),),
        total_steps=STEPS,
        policy=make(drop=DROP, update_every=EVERY, layers=layers),
        granularity="weight",
    )
    hand = ByHand(mlp(), [int(m.sum()) for m in controller.masks.values()], kind)
    assert follow(net, optimizer, controller, hand) > 400
    for i, (p, w) in enumerate(zip(net.parameters(), hand.w, strict=True)):
        w = w if i % 2 else w * hand.masks[i // 2]
        torch.testing.assert_close(p.detach(), w, rtol=1e-3, atol=1e-4)
