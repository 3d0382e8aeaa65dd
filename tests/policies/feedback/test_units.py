"""What the loop knows of every unit, whatever the size of the gradients that say it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_control import problem

from controlprune.control.horizon import Horizon
from controlprune.control.ramp import Plan
from controlprune.policies.feedback.control import Control
from controlprune.policies.feedback.units import UnitRecord
from controlprune.saliency.moments import start_moments


def record() -> UnitRecord:
    found = UnitRecord(problem(), moves=True, ranks=True)
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
    assert torch.equal(scaled.window, plain.window)


@pytest.mark.parametrize(
    ("plan", "heeded"),
    [
        (Plan(), False),
        (Plan(latest=0.2), True),
        (Plan(latest=0.2, agreement=0.0), False),
        (Horizon(), True),
        (Horizon(mistrust=0.0), False),
    ],
)
def test_units_are_ranked_where_the_plan_heeds_it(plan: Plan | Horizon, heeded: bool) -> None:
    units = Control(plan=plan).begin(problem()).units
    units.set_pace(20.0, 4)
    on = torch.ones(len(units.age), dtype=torch.bool)
    stable = 0.0
    for _ in range(2):
        units.observe(torch.linspace(1.0, 2.0, len(on)))
        stable = units.stability(on)
    assert stable == pytest.approx(float(heeded))
    assert (units.window.numel() > 0) is heeded
