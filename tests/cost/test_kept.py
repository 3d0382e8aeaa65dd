"""A budget that cannot be met is told with the widths that stand in its way."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import controlprune as cp


class Summed(nn.Module):
    """What the second and third layer make is summed along: their widths stay. Those of the others go."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (8, 32, 64, 64, 16, 4)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for n, layer in enumerate(self.layers):
            x = torch.relu(layer(x))
            x = x.cumsum(1) if n in (1, 2) else x
        return x


def told(budget: cp.Budget) -> list[str]:
    model = Summed()
    with pytest.raises(cp.InfeasibleBudget) as raised:
        cp.attach(
            model,
            torch.optim.SGD(model.parameters()),
            budget=budget,
            example_inputs=(torch.randn(2, 8),),
            total_steps=10,
        )
    assert raised.value.ranges.keys() == budget.targets().keys()
    return str(raised.value).splitlines()


def test_of_the_flops() -> None:
    """Narrowest: 8·2, 2·64, 64·64, 64·1, 1·4 multiply-adds; what is little is not told."""
    _, head, *lines = told(cp.Budget(flops=0.1))
    assert head == "Left alone, by share of the FLOPs of the narrowest net:"
    assert len(lines) == 1
    share = (2 * 64 + 64 * 64 + 64) / (8 * 2 + 2 * 64 + 64 * 64 + 64 + 4)
    assert lines[0].startswith(f"  {share:4.0%}  layers.1 (64) and 1 more: ")
    assert "cumsum" in lines[0]


def test_of_the_parameters() -> None:
    _, head, *lines = told(cp.Budget(params=0.1))
    assert head == "Left alone, by share of the parameters of the narrowest net:"
    assert [line.split(":")[0] for line in lines] == ["   99%  layers.1 (64) and 1 more"]


def test_nothing_is_left_alone_that_matters() -> None:
    model = nn.Sequential(nn.Linear(500, 64), nn.ReLU(), nn.Linear(64, 2))
    with pytest.raises(cp.InfeasibleBudget, match=r"lower the floors$"):
        cp.attach(
            model,
            torch.optim.SGD(model.parameters()),
            budget=cp.Budget(flops=1e-3),
            example_inputs=(torch.randn(2, 500),),
            total_steps=10,
        )
