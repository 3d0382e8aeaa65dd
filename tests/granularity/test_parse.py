"""What `granularity=` takes, and what it says of anything else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import controlprune as cp


def attached(granularity: object) -> cp.Controller:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    return cp.attach(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        budget=cp.Budget(flops=0.5),
        example_inputs=(torch.zeros(2, 8),),
        total_steps=10,
        granularity=granularity,  # type: ignore[arg-type]
    )


def test_channels_are_the_default() -> None:
    named, default = attached("channel"), attached_by_default()
    assert named.groups == default.groups


def attached_by_default() -> cp.Controller:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    return cp.attach(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        budget=cp.Budget(flops=0.5),
        example_inputs=(torch.zeros(2, 8),),
        total_steps=10,
    )


@pytest.mark.parametrize("granularity", ["chanel", "", "2;4"])
def test_an_unknown_name_is_told_what_there_is(granularity: str) -> None:
    with pytest.raises(ValueError, match=f'granularity={granularity!r}: give one of "channel"'):
        attached(granularity)


@pytest.mark.parametrize("granularity", [None, 3, ("channel",)])
def test_so_is_another_type(granularity: object) -> None:
    with pytest.raises(TypeError, match="granularity="):
        attached(granularity)
