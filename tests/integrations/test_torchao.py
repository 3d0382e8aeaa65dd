"""Quantizing what `finalize` gives with torchao, and the widths that its int4 leaves alone without a word."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import controlprune as cp

quantization = pytest.importorskip("torchao.quantization")

GROUP = 32


def _small(round_to: int | None) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 192), nn.ReLU(), nn.Linear(192, 8))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x = torch.randn(64, 64)
    controller = cp.attach(
        model,
        optimizer,
        budget=cp.Budget(flops=0.53),
        example_inputs=(x,),
        total_steps=20,
        round_to=round_to,
    )
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(x), torch.arange(64) % 8)
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
    return controller.finalize().eval(), x


def _quantized(model: nn.Module) -> list[bool]:
    """Per linear layer, in order."""
    return [type(m.weight) is not nn.Parameter for m in model.modules() if isinstance(m, nn.Linear)]


def test_eight_bits_change_little() -> None:
    small, x = _small(None)
    with torch.no_grad():
        before = small(x)
        quantization.quantize_(small, quantization.Int8WeightOnlyConfig())
        after = small(x)
    assert all(_quantized(small))
    assert (after - before).norm() < 0.02 * before.norm()


def test_round_to_the_group_size_quantizes_every_layer() -> None:
    small, x = _small(GROUP)
    config = quantization.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=quantization.PerGroup(GROUP)
    )
    with torch.no_grad():
        before = small(x)
        quantization.quantize_(small, config)
        after = small(x)
    assert all(_quantized(small))
    assert (after - before).norm() < 0.3 * before.norm()
