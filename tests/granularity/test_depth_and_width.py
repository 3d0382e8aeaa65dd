"""Depth against width under one budget; what is skipped among replicas, and in a folder of transformers."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import transformers as tr
from hf_tiny import FAMILIES, inputs
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from workers import ranks

import controlprune as cp

WIDTH, INNER = 16, 32


class Branch(nn.Module):
    """x + s · W relu(V x): what it says counts `loud` times, and of its neurons only every `used`-th."""

    def __init__(self, loud: float, used: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH, bias=False)
        self.register_buffer("heard", loud * (torch.arange(INNER) % used == 0))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)) * self.heard)


class Net(nn.Module):
    def __init__(self, loud: tuple[float, ...], used: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 4)
        self.branches = nn.ModuleList(Branch(s, used) for s in loud)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch in self.branches:
            x = x + branch(x)
        return self.head(x)


def labelled(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
    return x, (x[:, :4] * x[:, 4:]).argmax(1)


def run(model: nn.Module, controller: cp.Controller, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for t in range(steps):
        x, y = labelled(t)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()


@pytest.mark.parametrize("useless", ["a branch", "neurons"])
def test_depth_and_width_compete_by_value_per_cost(useless: str) -> None:
    """A branch worth nothing goes, whole or but for a few neurons, and others keep theirs; where half of all
    neurons are worth nothing, these go and no branch."""
    torch.manual_seed(0)
    model = Net((1.0, 1e-4, 1.0), 1) if useless == "a branch" else Net((1.0, 1.0, 1.0), 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    controller = cp.attach(
        model,
        optimizer,
        budget=cp.Budget(flops=0.7 if useless == "a branch" else 0.6),
        example_inputs=(torch.zeros(32, 8),),
        total_steps=200,
        granularity="channel+layer",
        ignored_layers=["stem", "head"],
    )
    run(model, controller, optimizer, 200)
    masks = controller.masks
    layers = [bool(mask.any()) for name, mask in masks.items() if name.startswith("layer")]
    inner = {name: mask for name, mask in masks.items() if mask.numel() == INNER}
    assert len(layers) == len(inner) == 3
    if useless == "a branch":
        first, second, third = (int(mask.sum()) * on for mask, on in zip(inner.values(), layers, strict=True))
        assert second <= INNER // 8
        assert min(first, third) >= INNER * 3 // 4
        return
    assert all(layers)
    wasted = sum(int(mask[1::2].sum()) for mask in inner.values())
    used = sum(int(mask[::2].sum()) for mask in inner.values())
    assert used > 2 * wasted


@ranks(2)
def test_skipped_branches_among_replicas(rank: int) -> None:
    torch.manual_seed(0)
    inner = Net((1.0, 1e-4, 1.0), 1)
    optimizer = torch.optim.Adam(inner.parameters(), lr=0.01)
    model = DDP(inner)
    controller = cp.attach(
        model,
        optimizer,
        budget=cp.Budget(flops=0.7),
        example_inputs=(torch.zeros(32, 8),),
        total_steps=60,
        granularity="layer",
    )
    for t in range(60):
        x, y = labelled(2 * t + rank)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
    assert not all(bool(mask.any()) for mask in controller.masks.values())
    controller.finalize()
    for t in range(3):
        x, y = labelled(100 + 2 * t + rank)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    mine = torch.cat([p.detach().flatten() for p in inner.parameters()])
    mean = mine.clone()
    torch.distributed.all_reduce(mean)
    torch.testing.assert_close(mean / 2, mine)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_skipped_branches_in_a_folder(name: str, tmp_path: Path) -> None:
    model, x = FAMILIES[name](), inputs(name)
    model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    controller = cp.attach(
        model,
        optimizer,
        budget=cp.Budget(flops=0.8),
        example_inputs=x,
        total_steps=10,
        granularity="channel+layer",
    )
    masks = controller.masks
    layers = [key for key in masks if key.startswith("layer")]
    assert len(layers) >= 2
    off = {layers[1]: torch.zeros(1, dtype=torch.bool)}
    narrow = next(key for key in masks if key not in layers and len(masks[key]) >= 8)
    off[narrow] = torch.arange(len(masks[narrow])) < len(masks[narrow]) // 2
    controller.set_masks(off)
    with torch.no_grad():
        expected = model(**x)[0]
    assert isinstance(model, tr.PreTrainedModel)
    cp.save_pretrained(controller, tmp_path / "during")
    small = plainly_finalized(controller)
    cp.save_pretrained(controller, tmp_path / "after")
    for when in ("during", "after"):
        found = cp.from_pretrained(tmp_path / when, type(model)).eval()
        assert found.state_dict().keys() == small.state_dict().keys()
        with torch.no_grad():
            torch.testing.assert_close(found(**x)[0], expected)


def plainly_finalized(controller: cp.Controller) -> nn.Module:
    """At the masks that were set by hand."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return controller.finalize()
