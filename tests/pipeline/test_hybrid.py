"""States and neurons under one budget: states early, by their values; the controller with what is left."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

import controlprune as cp
from controlprune import ssm


class Hybrid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(2, 8)
        self.lru = ssm.LRU(8, 32, radius=(0.5, 0.95))
        self.mlp = nn.Sequential(nn.Linear(8, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 3))

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.lru(self.encode(u)).mean(1))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Which of three lags does the second channel follow the first with?"""
    lag = torch.randint(3, (32,))
    first = torch.randn(32, 16)
    second = torch.stack([row.roll(int(k)) for row, k in zip(first, lag, strict=True)])
    return torch.stack([first, second], 2), lag


def flops(model: nn.Module, u: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(u)
    return counter.get_total_flops()


def test_a_hybrid_ends_inside_one_flops_budget() -> None:
    model = Hybrid()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    u = batch()[0]
    dense = flops(model, u)
    truncation = ssm.Truncation(model, optimizer, total_steps=150, tolerance=0.1, window=0.2, cuts=3)

    def step() -> torch.Tensor:
        x, y = batch()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    for _ in range(30):
        step()
        truncation.step()
        optimizer.zero_grad()
    states = model.lru.states
    assert states < 32
    with_small_states = flops(model, u)
    assert with_small_states < dense

    controller = cp.attach(
        model,
        optimizer,
        budget=cp.Budget(flops=f"{0.4 * dense:.0f} FLOP"),
        example_inputs=(u,),
        total_steps=120,
    )
    for _ in range(120):
        controller.step(step())
        optimizer.zero_grad()
    small = controller.finalize()
    assert flops(small, u) <= 0.4 * dense
    assert model.lru.states == states, "the controller leaves the recurrence alone"
    assert small.mlp[0].out_features < 96
    step()
