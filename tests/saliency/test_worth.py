"""Worth: what units are worth as others of their group go."""

from __future__ import annotations

import numpy as np
import pytest

from controlprune.saliency.worth import depleted


def test_where_few_units_hold_all_value_worth_is_value() -> None:
    values = np.array([1e-6, 5.0, 2e-6, 3.0])
    worth = depleted(values)
    assert worth[[0, 2]] == pytest.approx(values[[0, 2]], rel=1e-5)
    assert worth[3] == pytest.approx(values[3], rel=1e-5)


def test_where_all_are_alike_worth_falls_with_the_square_of_the_width() -> None:
    worth = depleted(np.full(8, 2.0))
    assert sorted(worth, reverse=True) == pytest.approx([2.0 * (8 / j) ** 2 for j in range(1, 9)])


def test_worth_is_the_slope_of_the_rise_of_the_loss() -> None:
    """R = V (V/V_S − 1), differentiated by hand where a unit is split finely."""
    values = np.sort(np.random.default_rng(0).exponential(size=400))[::-1]
    whole, kept = values.sum(), np.cumsum(values)
    rise = whole * (whole / kept - 1)
    slope = (rise[99:300] - rise[101:302]) / 2
    assert depleted(values)[100:301] == pytest.approx(slope, rel=0.05)


def test_order_and_concavity() -> None:
    values = np.random.default_rng(1).lognormal(sigma=2.0, size=50)
    worth = depleted(values)
    assert (np.argsort(-worth) == np.argsort(-values)).all()
    assert (worth >= values).all()
