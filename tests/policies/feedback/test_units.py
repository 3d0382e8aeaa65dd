"""What the loop knows of every unit, whatever the size of the gradients that say it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_control import problem

from controlprune.policies.feedback.units import UnitRecord
from controlprune.saliency.moments import start_moments


def record() -> UnitRecord:
    found = UnitRecord(problem(), moves=True)
    found.set_pace(20.0, 4)
    return found


def test_gradients_may_grow_by_thirty_orders_of_magnitude() -> None:
    """A net that starts at nothing: what was seen first is nothing beside what is seen then."""
    torch.manual_seed(0)
    grown, late = record(), record()
    seen = torch.randn(40, len(grown.age))
    for power, row in zip(range(-36, 4), seen, strict=True):
        grown.observe(row * 10.0**power)
        if power < -4:
            late.moments = replace(start_moments(len(row)), count=late.moments.count + 1)
        else:
            late.observe(row * 10.0**power)
    assert all(
        bool(x.isfinite().all()) for x in (*vars(grown.moments).values(), grown.window, grown.movement)
    )
    scale = late.scale / grown.scale
    torch.testing.assert_close(grown.moments.first, late.moments.first * scale, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(grown.moments.second, late.moments.second * scale**2, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(grown.movement, late.movement * scale, rtol=1e-3, atol=1e-6)
    assert torch.equal(grown.moments.count, late.moments.count)


@pytest.mark.parametrize("power", [-120, 0, 120])
def test_a_scale_changes_nothing(power: int) -> None:
    torch.manual_seed(0)
    plain, scaled = record(), record()
    for row in torch.randn(8, len(plain.age)).double():
        plain.observe(row.float())
        scaled.observe(row * 2.0**power)
    assert scaled.scale == plain.scale * 2.0**power
    torch.testing.assert_close(scaled.moments.second, plain.moments.second)
