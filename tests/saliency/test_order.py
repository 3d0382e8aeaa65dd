"""Order: which unit of a group holds which of its values."""

from __future__ import annotations

import torch
from torch import Tensor

from controlprune.saliency.network import Statistics
from controlprune.saliency.order import ordered

GROUP = torch.tensor([0] * 6 + [1] * 4)
VALUES = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0, 6.0, 0.4, 0.1, 0.2, 0.3])


def _known(weight: Tensor, on: Tensor | None = None) -> Statistics:
    zero = torch.zeros(len(VALUES))
    on = torch.ones(len(VALUES), dtype=torch.bool) if on is None else on
    return Statistics(zero, zero, weight, zero, zero + 9, zero, zero, on, GROUP, 0.0, 0.5)


def test_where_norms_say_the_same_or_the_opposite_nothing_moves() -> None:
    assert torch.equal(ordered(VALUES, _known(VALUES * 7)), VALUES)
    assert torch.equal(ordered(VALUES, _known(-VALUES)), VALUES)


def test_where_norms_agree_they_say_which_unit_and_values_how_much() -> None:
    norms = torch.tensor([3.0, 1.0, 2.0, 6.0, 5.0, 4.0, 4.0, 1.0, 2.0, 3.0])  # ρ: 1 − 6·6/210 of 6, 1 of 4
    found = ordered(VALUES, _known(norms))
    assert torch.equal(found, torch.tensor([3.0, 1.0, 2.0, 6.0, 5.0, 4.0, 0.4, 0.1, 0.2, 0.3]))


def test_between_the_two_it_is_the_mean_of_both_ranks() -> None:
    """ρ = (6 (1 − 6·44/210) + 4)/10 = 43/175, so a = 51/70."""
    norms = torch.tensor([1.0, 2.0, 4.0, 3.0, 6.0, 0.0, 4.0, 1.0, 2.0, 3.0])
    by_value, by_norm = [2, 0, 1, 4, 3, 5], [1, 2, 4, 3, 5, 0]
    mixed = [(19 * x + 51 * y) / 70 for x, y in zip(by_value, by_norm, strict=True)]
    expected = [float(1 + sorted(mixed).index(z)) for z in mixed]
    assert ordered(VALUES, _known(norms)).tolist() == [*expected, *VALUES[6:].tolist()]


def test_units_that_are_off_keep_what_they_promise() -> None:
    on = torch.tensor([True, True, False, True, True, True, True, True, True, True])
    norms = torch.tensor([3.0, 1.0, 99.0, 6.0, 5.0, 4.0, 4.0, 1.0, 2.0, 3.0])
    found = ordered(VALUES, _known(norms, on))
    assert found[2] == VALUES[2]
    assert sorted(found.tolist()) == sorted(VALUES.tolist())
    assert found[3] == 6.0


def test_few_units_and_none_say_nothing() -> None:
    on = torch.zeros(len(VALUES), dtype=torch.bool)
    assert torch.equal(ordered(VALUES, _known(-VALUES, on)), VALUES)
    on[:3] = True
    assert torch.equal(ordered(VALUES, _known(VALUES, on)), VALUES)
