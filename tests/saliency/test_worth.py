"""Worth: what units are worth as others of their group go."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from controlprune.saliency.worth import depleted, plasticity, weighed


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


def test_plasticity_is_how_far_the_weights_are_from_where_they_began() -> None:
    first = (torch.ones(4), torch.ones(4))
    assert plasticity(first, first) == 0.0
    assert plasticity(first, (4 * torch.ones(4), 2 * torch.ones(4))) == pytest.approx((0.75 + 0.5) / 2)
    assert plasticity(first, (torch.ones(4) / 2, torch.ones(4))) == 0.0  # weights that decayed: nothing new


def test_groups_weigh_by_what_they_do_where_nothing_was_written() -> None:
    values = (np.array([3.0, 1.0]), np.array([0.5, 0.2, 0.1]))
    for found, v in zip(weighed(values, [1.0, 5.0], 0.0), values, strict=True):
        assert found == pytest.approx(v)  # and their values add up


def test_groups_weigh_by_what_they_cost_where_all_was_written() -> None:
    """Units that are alike are then worth the same per cost at the same fraction of every group."""
    values, costs = (np.full(4, 7.0), np.full(8, 0.01)), (2.0, 6.0)
    worth = weighed(values, costs, 1.0)
    per_cost = [np.sort(w) / (c / len(w)) for w, c in zip(worth, costs, strict=True)]
    assert per_cost[0] == pytest.approx(per_cost[1][::2])  # j of 4 and 2 j of 8 stay
    assert sum(w.min() * len(w) for w in worth) == pytest.approx(4 * 7.0 + 8 * 0.01)
