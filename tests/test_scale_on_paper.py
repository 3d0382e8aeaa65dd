"""The plan on paper adds up."""

from __future__ import annotations

import pytest
from scale import Cluster, Model, plan


def test_it_pays_from_where_what_is_saved_makes_up_for_the_shrink() -> None:
    found = plan(Cluster(), Model(), fraction=0.5)
    assert found.pays_after * 0.5 * found.step == pytest.approx(found.shrink)
    assert found.saved == pytest.approx(0.85 * 0.5 - found.share)


def test_what_is_moved_does_not_depend_on_the_ranks_and_a_step_does() -> None:
    few, many = plan(Cluster(ranks=64), Model()), plan(Cluster(ranks=1024), Model())
    assert few.shrink_bytes == many.shrink_bytes
    assert few.step == pytest.approx(16 * many.step)
    assert many.pays_after > few.pays_after
