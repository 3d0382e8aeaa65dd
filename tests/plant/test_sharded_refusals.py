"""Optimizers whose state is not laid out as the parameter is are refused on shards, by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from workers import ranks

import controlprune as cp


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))


@ranks(2)
def test_adafactor_and_lbfgs(rank: int) -> None:
    for kind in (torch.optim.Adafactor, torch.optim.LBFGS):
        traced, model = cp.trace(net(), (torch.zeros(2, 8),)), net()
        fully_shard(model)
        with pytest.raises(ValueError, match=f"{kind.__name__} keeps state of another layout"):
            cp.attach(
                model,
                kind(model.parameters()),
                budget=cp.Budget(flops=0.5),
                example_inputs=traced,
                total_steps=9,
            )
