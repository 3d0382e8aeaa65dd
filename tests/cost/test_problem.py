"""From a structure and a budget to numbers: costs, targets, width steps, floors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rig import flops, mlp

from controlprune.budget import Budget, InfeasibleBudget, Price
from controlprune.cost.grid import Steps, width_steps
from controlprune.cost.problem import pose
from controlprune.cost.survey import exact_costs
from controlprune.policies.base import Problem
from controlprune.structure import analyse

X = torch.zeros(2, 8)


def problem(budget: Budget | Price, round_to: int | None = None) -> Problem:
    structure = analyse(mlp(), (X,))
    named = budget.targets() if isinstance(budget, Budget) else budget.prices()
    costs = exact_costs(named, structure)
    return pose(structure, budget, costs, total_steps=10, round_to=round_to, batch=2, seed=0)


def test_width_steps() -> None:
    assert width_steps((1, 15, 16, 32, 64, 300, 4096), None) == (1, 1, 1, 2, 4, 16, 16)
    assert width_steps((4, 64), 8) == (4, 8)


@pytest.mark.parametrize("wrong", [0, -2, 1.5, True, "8"])
def test_a_width_step_that_is_none(wrong: Any) -> None:
    with pytest.raises(ValueError, match=rf"round_to={wrong!r}: give a whole number"):
        width_steps((32,), wrong)


def test_between_blocks_there_is_nothing_where_the_clock_is_under_budget() -> None:
    structure = analyse(mlp(), (X,))
    counted = Steps.of(structure, None, (16, 1))
    assert (counted.steps, counted.grains, counted.floors) == ((16, 1), (1, 1), (2, 1))
    timed = Steps.of(structure, None, (16, 1), timed=True)
    assert (timed.steps, timed.grains, timed.floors) == ((16, 1), (16, 1), (2, 1))
    assert timed.rungs(structure.sizes) == [(16, 32), tuple(range(1, 25))]
    told = Steps.of(structure, 8, timed=True)
    assert (told.steps, told.grains, told.floors) == ((8, 8), (8, 8), (8, 8))


def test_a_budget_becomes_fractions() -> None:
    model = mlp()
    found = problem(Budget(flops="60%", params="1 k"))
    parameters = sum(p.numel() for p in model.parameters())
    assert found.dense == {"flops": flops(model, X), "params": parameters}
    assert found.budget == {"flops": pytest.approx(0.6), "params": pytest.approx(1000 / parameters)}
    assert found.prices == {}
    assert found.fraction("flops", (32, 24)) == 1.0
    assert found.fraction("flops", (16, 12)) == (8 * 16 + 16 * 12 + 12 * 4) / (8 * 32 + 32 * 24 + 24 * 4)
    assert found.elements == 24 * 32 + 4 * 24  # what reads a unit
    assert found.floors == found.steps == (2, 1)


def test_an_amount_above_dense_asks_for_nothing() -> None:
    assert problem(Budget(flops="9 GFLOP")).budget == {"flops": 1.0}


def test_a_price_has_no_limit() -> None:
    found = problem(Price(flops=0.1, params=2))
    assert (found.budget, found.prices) == ({}, {"flops": 0.1, "params": 2.0})
    assert set(found.costs) == {"flops", "params"}


def test_a_floor_of_whole_steps_bounds_what_can_be_reached() -> None:
    least = problem(Budget(flops=1.0)).fraction("flops", (8, 8))
    problem(Budget(flops=least * 1.001), round_to=8)
    with pytest.raises(InfeasibleBudget, match="flops"):
        problem(Budget(flops=least * 0.999), round_to=8)
