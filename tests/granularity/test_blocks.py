"""Tiles of weights: masked is what is finalized, step for step; what cannot be is said, nothing changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rig import batch
from torch import Tensor, nn
from torch.optim import Optimizer

import controlprune as cp
from controlprune.plant.block_linear import BlockLinear, tiles

POLICIES: dict[str, Any] = {
    "magnitude": cp.Magnitude(),
    "static": cp.Static(layers="erk"),
    "set": cp.SET(update_every=5),
    "rigl": cp.RigL(update_every=5),
    "control": cp.Control(),
}
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
}


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4))


def attach(model: nn.Module, optimizer: Optimizer, policy: Any = None, **options: Any) -> Any:
    given = {
        "budget": cp.Budget(params=0.5),
        "example_inputs": (torch.zeros(2, 8),),
        "total_steps": 40,
        "granularity": "block:8x4",
    }
    return cp.attach(model, optimizer, policy=policy, **{**given, **options})


def train(model: nn.Module, optimizer: Optimizer, controller: Any, first: int, last: int) -> None:
    for t in range(first, last):
        x, y = batch(t, (8,))
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if controller is not None:
            controller.step(loss)
        optimizer.zero_grad()


def live_tiles(weight: Tensor) -> Tensor:
    return tiles(weight.detach(), 8, 4).ne(0).any(-1).any(-1)


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_masked_is_what_is_finalized(name: str) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    controller = attach(model, optimizer, POLICIES[name])
    assert [g.size for g in controller.groups] == [8, 24]
    assert "4.weight (96): its 4 x 24 is no multiple of 8 x 4" in controller.report()
    for t in range(40):
        train(model, optimizer, controller, t, t + 1)
        for index, mask in zip((0, 2), controller.masks.values(), strict=True):
            assert not bool((live_tiles(model[index].weight) & ~mask.view(-1, 8 if index else 2)).any())
    x = batch(99, (8,))[0]
    masked = model(x)
    small = controller.finalize()
    assert small is model
    assert type(small[0]) is BlockLinear
    torch.testing.assert_close(small(x), masked)
    assert controller.cost()["params"].fraction <= 0.5
    assert sum(p.numel() for p in small.parameters()) == controller.cost()["params"].value


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_steps_masked_are_steps_of_the_finalized_net(kind: str) -> None:
    """Adafactor's factors are no numbers of single weights: it begins anew, and still trains."""
    model = mlp().double()
    optimizer = OPTIMIZERS[kind](model.parameters())
    x = torch.zeros(2, 8, dtype=torch.float64)
    controller = attach(model, optimizer, cp.Static(), example_inputs=(x,), total_steps=1000)

    def steps(net: nn.Module, own: Optimizer, count: int, control: Any = None) -> None:
        for t in range(count):
            a, y = batch(t, (8,))
            loss = nn.functional.cross_entropy(net(a.double()), y)
            loss.backward()
            own.step()
            if control is not None:
                control.step(loss)
            own.zero_grad()

    steps(model, optimizer, 5, controller)
    masked = copy.deepcopy(model)
    own = OPTIMIZERS[kind](masked.parameters())
    own.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again = attach(masked, own, cp.Static(), example_inputs=(x,), total_steps=1000)
    again.set_masks(controller.masks)
    small = controller.finalize()
    steps(masked, own, 6, again)
    steps(small, optimizer, 6)
    if kind != "adafactor":
        a = batch(99, (8,))[0].double()
        torch.testing.assert_close(small(a), masked(a))
        state = small.state_dict()
        for name, value in masked.state_dict().items():
            torch.testing.assert_close(state[name], value)


def test_files_open_in_the_dense_class(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = attach(model, optimizer, cp.RigL(update_every=5))
    train(model, optimizer, controller, 0, 40)
    x = batch(99, (8,))[0]
    for name in ("masked", "finalized"):
        cp.save(controller, tmp_path / name)
        torch.testing.assert_close(cp.load(tmp_path / name, mlp(1))(x), model(x))
        if name == "masked":
            controller.finalize()
    other = mlp(1)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x))


def test_beside_others_in_a_dict() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = {"0": "block:8x4", "2": "weight"}
    controller = attach(model, optimizer, cp.Gradual(), granularity=given)
    train(model, optimizer, controller, 0, 40)
    x = batch(99, (8,))[0]
    masked = model(x)
    small = controller.finalize()
    assert [type(small[0]), type(small[2])] == [BlockLinear, nn.Linear]
    torch.testing.assert_close(small(x), masked)


class Reads(nn.Module):
    """One layer is called, of the other only the weight is used."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.a(x)) @ self.b.weight.t()


def test_weights_that_others_read_are_left_alone() -> None:
    model = Reads()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = attach(model, optimizer, budget=cp.Budget(params=0.8))
    assert list(controller.masks) == ["a.weight"]
    assert "b.weight (128): it is also read outside of its layer" in controller.report()


def test_fused_layers_of_torch_are_left_alone() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(nn.Linear(16, 16), layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = attach(
        model, optimizer, budget=cp.Budget(params=0.99), example_inputs=(torch.zeros(2, 5, 16),)
    )
    assert list(controller.masks) == ["0.weight"]


@pytest.mark.parametrize(
    ("granularity", "message"),
    [
        ("block:64x32", "its 32 x 8 is no multiple of 64 x 32"),
        ("block:7x3", "no parameter of this model has units to prune"),
        ("block:0x4", "R, C >= 1"),
        ("block:8", "give one of"),
        ("block:8x-4", "give one of"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_changed(granularity: str, message: str) -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        attach(model, torch.optim.SGD(model.parameters(), lr=0.1), granularity=granularity)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model._forward_pre_hooks
