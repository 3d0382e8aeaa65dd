"""SET and RigL against an implementation by hand: equal masks at each of 200 steps, and weights."""

from __future__ import annotations

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
    """Dense weights, gates multiplied onto the hidden layers, SGD entry by entry where both ends are on."""

    def __init__(self, net: nn.Sequential, widths: list[int], kind: str) -> None:
        self.w = [p.detach().clone() for p in net.parameters()]  # w₁ b₁ w₂ b₂ w₃ b₃
        self.v = [torch.zeros_like(w) for w in self.w]
        self.kind, self.random = kind, torch.Generator().manual_seed(0)
        self.masks = [random_mask(*pair, self.random) for pair in zip((32, 24), widths, strict=True)]

    def step(self, t: int) -> None:
        x, y = batch(t, (8,))
        w = [p.clone().requires_grad_() for p in self.w]
        gates = [m.float().requires_grad_() for m in self.masks]
        h = torch.relu(x @ w[0].T + w[1]) * gates[0]
        h = torch.relu(h @ w[2].T + w[3]) * gates[1]
        loss = nn.functional.cross_entropy(h @ w[4].T + w[5], y)
        grads = torch.autograd.grad(loss, [*w, *gates])
        for p, v, g, live in zip(self.w, self.v, grads, self._live(), strict=False):
            descended(p, v, g, live)
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
            gain = torch.rand(len(mask), generator=self.random) if self.kind == "set" else gradient.abs()
            new.append(exchanged(mask, norm, gain, share(self.kind, progress)))
        self.masks = new


@pytest.mark.parametrize(("kind", "make"), [("set", cp.SET), ("rigl", cp.RigL)])
def test_the_same_masks_for_two_hundred_steps(kind: str, make: type[cp.SET | cp.RigL]) -> None:
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
    controller = cp.attach(
        net,
        optimizer,
        budget=cp.Budget(flops=0.4),
        example_inputs=(torch.zeros(2, 8),),
        total_steps=STEPS,
        policy=make(drop=DROP, update_every=EVERY),
    )
    hand = ByHand(mlp(), [int(m.sum()) for m in controller.masks.values()], kind)
    assert follow(net, optimizer, controller, hand) > 40
    controller.detach()
    for ours, theirs in zip(net.parameters(), hand.w, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-3, atol=1e-4)
