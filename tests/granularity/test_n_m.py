"""N of every M: the pattern holds at every step and in what is finalized, under every policy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rig import batch
from torch import Tensor, nn

import controlprune as cp
from controlprune.granularity.n_m import nearest

POLICIES: dict[str, Any] = {
    "magnitude": cp.Magnitude(),
    "gradual": cp.Gradual(),
    "static": cp.Static(),
    "snip": cp.Static(by="snip"),
    "set": cp.SET(update_every=5),
    "rigl": cp.RigL(update_every=5),
    "control": cp.Control(),
}


class Net(nn.Module):
    """A convolution whose 3 inputs no pattern of 4 divides, one whose 16 do, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        self.c = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))


def counts(weight: Tensor, m: int) -> Tensor:
    """How many of every m along the inputs are not zero."""
    return (weight != 0).transpose(1, -1).reshape(-1, m).sum(1)


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
@pytest.mark.parametrize("name", POLICIES)
def test_the_pattern_holds(name: str, pattern: str) -> None:
    n, m = map(int, pattern.split(":"))
    torch.manual_seed(0)
    model = Net()
    work = {
        name: p.numel() * (1 if name[0] == "c" else 16) for name, p in model.named_parameters() if p.ndim > 1
    }
    least = (work["a.weight"] + (work["b.weight"] + work["c.weight"]) * n / m) / sum(work.values()) + 1e-9
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    controller = cp.attach(
        model,
        optimizer,
        budget=cp.Budget(flops=least),
        example_inputs=(torch.zeros(2, 1, 4, 4),),
        total_steps=40,
        policy=POLICIES[name],
        granularity=pattern,
    )
    assert list(controller.masks) == ["b.weight", "c.weight"]
    assert "a.weight (144): its 1 inputs are no multiple of 4" in controller.report()
    for t in range(1, 41):
        x, y = batch(t, (1, 4, 4))
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
        for weight in (model.b.weight, model.c.weight):
            each = counts(weight.detach(), m)
            assert int(each.max()) in (n, m), t
    small = controller.finalize()
    assert all(int(counts(w.detach(), m).max()) <= n for w in (small.b.weight, small.c.weight))
    assert controller.cost()["flops"].fraction <= least


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(0, 1000))
def test_by_magnitude_it_is_the_largest_of_every_m(n: int, seed: int) -> None:
    torch.manual_seed(seed)
    w, m = torch.randn(6, 16, 3, 3), 8
    mask = torch.zeros(w.numel(), dtype=torch.bool)
    mask[w.abs().flatten().topk(n * w.numel() // m).indices] = True
    found = nearest(mask, w, m).view(w.shape)
    blocks, on = (x.transpose(1, -1).reshape(-1, m) for x in (w.abs(), found))
    expected = torch.zeros_like(on).scatter_(1, blocks.topk(n, dim=1).indices, True)
    assert torch.equal(on, expected)
    assert torch.equal(nearest(found.flatten(), -w, m), found.flatten())  # it stays as it is


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("4:4", "1 <= N < M"), ("0:4", "1 <= N < M"), ("2:3", "no parameter of this model has units")],
)
def test_bad_patterns(pattern: str, message: str) -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    with pytest.raises(ValueError, match=message):
        cp.attach(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            budget=cp.Budget(flops=0.7),
            example_inputs=(torch.zeros(2, 8),),
            total_steps=10,
            granularity=pattern,
        )


def test_masks_by_hand_must_be_of_the_pattern() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    controller = cp.attach(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        budget=cp.Budget(flops=0.7),
        example_inputs=(torch.zeros(2, 8),),
        total_steps=10,
        granularity="2:4",
    )
    first = torch.arange(256) < 128
    with pytest.raises(ValueError, match="masks: '0"):
        controller.set_masks({"0.weight": first})
    controller.set_masks({"0.weight": torch.arange(256) % 4 < 2})
    assert counts(model[0].weight.detach(), 4).eq(2).all()
