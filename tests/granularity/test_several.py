"""Several granularities on one model: one owner for every parameter, one budget over all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import controlprune as cp


class Net(nn.Module):
    """Hidden units between fixed ends, then a matrix that stands alone, then one a pattern fits."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))
        self.alone, self.last = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.hidden(x))
        return self.last(h + torch.tanh(self.alone(h + 1.0) @ torch.eye(16)))


KINDS: dict[Any, Any] = {"hidden": "channel", "alone": "weight", "last": "2:4"}


def attach(granularity: Any, budget: float = 0.55, policy: Any = None) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    options = {"budget": cp.Budget(params=budget), "example_inputs": (torch.zeros(2, 8),), "total_steps": 60}
    return model, optimizer, cp.attach(model, optimizer, **options, policy=policy, granularity=granularity)  # type: ignore[arg-type]


def train(model: nn.Module, optimizer: Any, controller: Any, start: int, stop: int) -> None:
    for t in range(start, stop):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(t))
        loss = nn.functional.cross_entropy(model(x), x[:, :4].argmax(1))
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()


@pytest.mark.parametrize("policy", [cp.Control(), cp.RigL(update_every=6), cp.Gradual()])
def test_all_of_them_under_one_budget(policy: Any) -> None:
    model, optimizer, controller = attach(KINDS, policy=policy)
    assert list(controller.masks) == ["hidden.0", "alone.weight", "last.weight"]
    train(model, optimizer, controller, 0, 60)
    controller.shrink()
    x = torch.randn(5, 8)
    live = model(x)
    controller.expand()
    torch.testing.assert_close(model(x), live)
    small = controller.finalize()
    torch.testing.assert_close(small(x), live)
    count = sum(int((p != 0).sum()) if p.ndim > 1 else p.numel() for p in small.parameters())
    dense = sum(p.numel() for p in Net().parameters())
    assert count <= 0.55 * dense
    assert controller.cost()["params"].value == pytest.approx(count, abs=dense * 0.02)
    assert len(small.hidden[0].weight) < 32
    assert (small.last.weight.view(-1, 4) != 0).sum(1).max() <= 4


def test_modules_are_named_by_themselves_or_by_name_the_innermost_wins() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = cp.attach(
        model,
        optimizer,
        budget=cp.Budget(params=0.6),
        example_inputs=(torch.zeros(2, 8),),
        total_steps=60,
        granularity={"": "weight", model.hidden: "channel"},
    )
    assert list(controller.masks) == ["hidden.0", "alone.weight", "last.weight"]


def test_resumed_it_is_the_same_run() -> None:
    whole, first, second = (attach(KINDS) for _ in range(3))
    train(*whole, 0, 60)
    train(*first, 0, 40)
    states = [part.state_dict() for part in first]
    for part, state in zip(reversed(second), reversed(states), strict=True):
        part.load_state_dict(state)
    train(*second, 40, 60)
    assert all(torch.equal(m, second[2].masks[n]) for n, m in whole[2].masks.items())
    for a, b in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "unknown module": ({"nowhere": "weight"}, ValueError, "has no module called 'nowhere'"),
    "another's module": ({nn.Linear(2, 2): "weight"}, ValueError, "Linear is not a module of the model"),
    "unknown kind": ({"alone": "weights"}, ValueError, "granularity='weights': give one of"),
    "a channel read by another's": (
        {"hidden.0": "channel", "hidden.2": "weight"},
        ValueError,
        "'hidden.0' has no unit",
    ),
    "whole tensors twice": ({"hidden": "channel", "alone": "layer"}, ValueError, "both cut whole tensors"),
    "nested": ({"hidden": {"0": "weight"}}, TypeError, "a mapping in the mapping"),
    "no module": ({3: "weight"}, TypeError, "3 is no module"),
    "empty": ({}, TypeError, "granularity="),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    given, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        attach(given)


def test_a_module_that_is_named_twice() -> None:
    model = Net()
    with pytest.raises(ValueError, match='\'alone\' is to be "weight" and "2:4"'):
        cp.attach(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            budget=cp.Budget(params=0.5),
            example_inputs=(torch.zeros(2, 8),),
            total_steps=10,
            granularity={"alone": "weight", model.alone: "2:4"},
        )
