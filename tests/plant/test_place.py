"""A mask in place: as wide as its weights up to a size, whatever numbers it meets."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import controlprune as cp
from controlprune.plant import place
from controlprune.plant.place import mask_like, silence_


def test_a_mask_is_as_wide_as_its_weights_up_to_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16}
    for kind, wide in kinds.items():
        assert mask_like(torch.zeros(3, 2, dtype=kind)).dtype == wide
    monkeypatch.setattr(place, "WIDE", 5)
    assert mask_like(torch.zeros(3, 2)).dtype == torch.int8


@pytest.mark.parametrize("bits", [torch.int64, torch.int32, torch.int16, torch.int8])
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_it_masks_numbers_of_any_width(kind: torch.dtype, bits: torch.dtype) -> None:
    """Not numbers too, and the signs of what stays."""
    values = torch.tensor([1.5, math.nan, -0.0, 2.0]).to(kind)
    silence_(values, torch.tensor([-1, 0, -1, 0], dtype=bits))
    assert values.float().tolist() == [1.5, 0.0, 0.0, 0.0]
    assert math.copysign(1.0, float(values.float()[2])) == -1.0


def test_a_model_taken_to_another_number_type_stays_masked() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    controller = cp.attach(
        model,
        optimizer,
        budget=cp.Budget(params=0.5),
        example_inputs=(torch.zeros(2, 8),),
        total_steps=50,
        granularity="weight",
        policy=cp.Static(),
    )
    for kind in (torch.float32, torch.bfloat16, torch.float64):
        model.to(kind)
        for state in optimizer.state.values():
            state["momentum_buffer"] = state["momentum_buffer"].to(kind)
        for _ in range(3):
            loss = model(torch.randn(16, 8, dtype=kind)).float().square().mean()
            loss.backward()
            for gradient, off in _dormant(model, controller, "grad"):
                assert not gradient[off].any()
            optimizer.step()
            controller.step(loss)
            optimizer.zero_grad()
        for weights, off in _dormant(model, controller, "data"):
            assert off.any()
            assert not weights[off].any()


def _dormant(
    model: nn.Module, controller: cp.Controller, what: str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    masks, parameters = controller.masks, dict(model.named_parameters())
    return [(getattr(parameters[name], what).flatten(), ~mask) for name, mask in masks.items()]
