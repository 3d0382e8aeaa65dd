"""Ranks within groups."""

from __future__ import annotations

import torch

from controlprune.saliency.ranks import ranks_within


def test_each_group_is_ranked_by_itself_and_of_equals_the_first_is_lower() -> None:
    found = ranks_within(torch.tensor([3.0, 1.0, 3.0, 9.0, 8.0]), [3, 0, 2])
    assert [ranks.tolist() for ranks in found] == [[1.0, 0.0, 2.0], [], [1.0, 0.0]]
