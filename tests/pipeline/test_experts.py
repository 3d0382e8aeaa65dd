"""A mixture of experts under budget: whole experts leave while it trains; the file has only those left."""

from __future__ import annotations

import copy
from pathlib import Path

import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import controlprune as cp
from controlprune.structure.standins import StandIn

STEPS = 40
DENSE = {"experts": 8, "up": 12}


class Mixture(nn.Module):
    """Eight experts behind one softmax; two of them hardly say anything."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(6, 8), nn.Linear(6, 3)
        self.up, self.down = nn.Parameter(torch.randn(8, 6, 12) / 3), nn.Parameter(torch.randn(8, 12, 6) / 3)
        self.down.data[2:4] *= 1e-3

    def forward(self, x: Tensor) -> Tensor:
        p = self.router(x).softmax(-1)
        hidden = torch.einsum("bd,edh->ebh", x, self.up).relu()
        return self.head(x + torch.einsum("be,ebh,ehd->bd", p, hidden, self.down))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 6, generator=generator)
    return x, (x[:, :3] * x[:, 3:]).argmax(1)


def attached(**options: object) -> tuple[nn.Module, torch.optim.Optimizer, cp.Controller]:
    torch.manual_seed(0)
    model = Mixture()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    given = {
        "budget": cp.Budget(params=0.4),
        "example_inputs": (batch(0)[0],),
        "total_steps": STEPS,
        **options,
    }
    return model, optimizer, cp.attach(model, optimizer, **given)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, controller: cp.Controller, steps: int) -> None:
    for step in range(steps):
        x, y = batch(step)
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
        assert loss.isfinite()


@pytest.mark.parametrize("shrink", [True, False])
def test_it_ends_inside_its_budget_with_fewer_experts(shrink: bool, tmp_path: Path) -> None:
    dense = sum(p.numel() for p in Mixture().parameters())
    model, optimizer, controller = attached(policy=cp.Control(shrink=shrink))
    train(model, optimizer, controller, STEPS)
    (experts,) = (mask for group, mask in zip(controller.groups, controller.masks.values(), strict=True)
                  if group.kind == "expert")  # fmt: skip
    x, masked = batch(99)[0], model(batch(99)[0])
    cp.save(controller, tmp_path / "small.safetensors")
    small = controller.finalize()
    assert not any(isinstance(module, StandIn) for module in small.modules())
    assert experts.sum() == small.router.out_features == len(small.up) == len(small.down) < 8
    assert sum(p.numel() for p in small.parameters()) <= 0.4 * dense
    torch.testing.assert_close(small(x), masked)
    torch.testing.assert_close(cp.load(tmp_path / "small.safetensors", Mixture())(x), masked)
    cross_entropy(small(x), batch(99)[1]).backward()
    optimizer.step()


def test_experts_off_by_hand_come_back_with_all_they_had() -> None:
    model, optimizer, controller = attached()
    train(model, optimizer, controller, 3)
    controller.set_masks({g.name: torch.ones(g.size, dtype=torch.bool) for g in controller.groups})
    before = copy.deepcopy(model.state_dict())
    (name,) = (group.name for group in controller.groups if group.kind == "expert")
    controller.set_masks({name: torch.arange(8) < 3})
    x = batch(7)[0]
    masked = model(x)
    controller.shrink()
    assert model.router.out_features == len(model.up) == 3
    torch.testing.assert_close(model(x), masked)
    controller.expand()
    torch.testing.assert_close(model(x), masked)
    controller.detach()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_of_those_that_are_picked_as_many_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = oracle.Picked()
    dense = sum(p.numel() for p in model.parameters())
    x, y = torch.randn(6, 4, 4), torch.randint(3, (6,))
    optimizer, budget = torch.optim.AdamW(model.parameters(), lr=0.01), cp.Budget(params=0.3)
    controller = cp.attach(model, optimizer, budget=budget, example_inputs=(x,), total_steps=STEPS)
    for _ in range(STEPS):
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
    masked = model(x)
    cp.save(controller, tmp_path / "small.safetensors")
    small = controller.finalize()
    assert len(small.router.weight) == len(small.up) == len(small.down) in (2, 3, 4)
    assert sum(p.numel() for p in small.parameters()) <= 0.3 * dense
    torch.testing.assert_close(small(x), masked)
    torch.testing.assert_close(cp.load(tmp_path / "small.safetensors", oracle.Picked())(x), masked)
