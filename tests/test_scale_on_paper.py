"""The plan on paper adds up, and its bytes are those that a rank of many would receive."""

from __future__ import annotations

import pytest
from many_ranks import simulated
from scale import Cluster, Model, plan, schedule


def test_it_pays_from_where_what_is_saved_makes_up_for_the_shrink() -> None:
    found = plan(Cluster(), Model(), fraction=0.5)
    assert found.pays_after * 0.5 * found.step == pytest.approx(found.shrink)
    assert found.saved == pytest.approx(0.85 * 0.5 - found.share)


def test_what_is_moved_does_not_depend_on_the_ranks_and_a_step_does() -> None:
    few, many = plan(Cluster(ranks=64), Model()), plan(Cluster(ranks=1024), Model())
    assert few.shrink_bytes == many.shrink_bytes
    assert few.step == pytest.approx(16 * many.step)
    assert many.pays_after > few.pays_after


@pytest.mark.parametrize("ranks", [8, 64])
def test_bytes_on_paper_are_those_of_a_rank(ranks: int) -> None:
    update, first, another = simulated(ranks, width=64, layers=2)
    assert update.received == update.expected
    for shrink in (first, another):  # more: rows filled up to a multiple of the ranks
        assert shrink.expected <= shrink.received < 1.1 * shrink.expected


def test_the_shrinks_of_a_run_save_what_its_plan_says() -> None:
    cluster, model = Cluster(), Model()
    found, step = schedule(cluster, model), plan(cluster, model).step
    assert [one.fraction for one in found] == pytest.approx([0.875, 0.75, 0.625, 0.5])
    assert found[-1].at == 30_000
    assert sum(one.saved for one in found) == pytest.approx(
        step * 0.125 * (92_500 + 85_000 + 77_500 + 70_000)
    )
    assert found[0].received < found[-1].received < found[1].received
