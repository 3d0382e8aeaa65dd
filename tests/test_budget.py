"""Budgets and prices: what is read, what is refused, and in which words."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlprune.budget import Budget, InfeasibleBudget, Price, parse


@pytest.mark.parametrize(
    ("resource", "value", "amount"),
    [
        ("flops", "1.2 GFLOP", 1.2e9),
        ("flops", "1.2 MFLOPs", 1.2e6),
        ("flops", "7e5FLOP", 7e5),
        ("flops", "2 GMAC", 4e9),
        ("train_flops", "3 PFLOP", 3e15),
        ("params", "1.2 M", 1.2e6),
        ("params", "7B", 7e9),
        ("params", "12000", 12e3),
        ("params", "12k params", 12e3),
        ("memory", "64 MiB", 64 * 2**20),
        ("memory", "1.5 GB", 1.5e9),
        ("memory", "512 B", 512),
        ("latency", "3 ms", 3e-3),
        ("latency", " 250 µs ", 250e-6),
        ("energy", "0.8 J", 0.8),
        ("energy", "5 mJ", 5e-3),
        ("train_time", "2 h", 7200),
        ("train_time", "90min", 5400),
        ("train_energy", "0.5 kWh", 1.8e6),
    ],
)
def test_amounts(resource: str, value: str, amount: float) -> None:
    target = parse(resource, value)
    assert not target.relative
    assert target.value == pytest.approx(amount, rel=1e-15)
    assert target.limit(10 * amount) == target.value
    assert target.limit(amount / 10) == amount / 10  # above dense: nothing is asked for


@pytest.mark.parametrize(
    ("value", "fraction"), [(0.5, 0.5), (1, 1.0), ("60%", 0.6), ("100 %", 1.0), (np.float32(0.25), 0.25)]
)
def test_fractions(value: object, fraction: float) -> None:
    target = parse("flops", value)
    assert target.relative
    assert target.limit(1000) == pytest.approx(1000 * fraction)


@given(st.floats(min_value=0, max_value=1, exclude_min=True))
def test_every_fraction_is_read(fraction: float) -> None:
    assert Budget(flops=fraction).limits({"flops": 8.0}) == {"flops": fraction * 8.0}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "fraction"),
        (0.0, "fraction"),
        (-1, "fraction"),
        (1.5, '"1.2 GFLOP"'),
        (10**9, '"1.2 GFLOP"'),
        (math.nan, "fraction"),
        (math.inf, "fraction"),
        ("3 apples", "apples"),
        ("apples", "does not start with a number"),
        ("", "does not start with a number"),
        ("0%", "share of dense"),
        ("-5%", "share of dense"),
        ("150%", "share of dense"),
        ("0 GFLOP", "not a positive amount"),
        ("-1 GFLOP", "not a positive amount"),
        ("1e999 GFLOP", "not a positive amount"),
        ("nan", "does not start with a number"),
        ("0.5", "unknown unit ''"),
        ("3 ms", "unknown unit 'ms'"),
        ("1.2 M", "unknown unit 'M'"),
    ],
)
def test_refused_values_name_argument_value_and_remedy(value: object, words: str) -> None:
    with pytest.raises(ValueError, match="Budget") as caught:
        Budget(flops=value)  # type: ignore[arg-type]
    message = str(caught.value)
    assert f"flops={value!r}" in message
    assert words in message


@pytest.mark.parametrize("value", [True, False, [0.5], (0.5,), {"a": 1}, 1j, b"60%"])
def test_refused_types(value: object) -> None:
    with pytest.raises(TypeError, match="Budget\\(params="):
        Budget(params=value)  # type: ignore[arg-type]


def test_less_than_one_parameter() -> None:
    with pytest.raises(ValueError, match="not a positive amount"):
        Budget(params="0.5")


def test_empty() -> None:
    with pytest.raises(ValueError, match="empty"):
        Budget()
    with pytest.raises(ValueError, match="empty"):
        Price()


def test_several_limits_together() -> None:
    budget = Budget(flops=0.5, params="1 M", latency="3 ms")
    dense = {"flops": 4e9, "params": 5e6, "latency": 1e-3, "memory": 1.0}
    assert budget.limits(dense) == {"flops": 2e9, "params": 1e6, "latency": 1e-3}
    assert budget == Budget(flops=0.5, params="1 M", latency="3 ms")
    assert hash(budget) == hash(Budget(flops=0.5, params="1 M", latency="3 ms"))


def test_prices() -> None:
    assert Price(flops=0.1).prices() == {"flops": 0.1}
    assert Price(flops=1, params=0.2).prices() == {"flops": 1.0, "params": 0.2}


@pytest.mark.parametrize("value", [0, -0.1, math.nan, math.inf])
def test_refused_prices(value: float) -> None:
    with pytest.raises(ValueError, match="Price\\(flops="):
        Price(flops=value)


@pytest.mark.parametrize("value", ["0.1", True])
def test_refused_price_types(value: object) -> None:
    with pytest.raises(TypeError, match="Price\\(flops="):
        Price(flops=value)  # type: ignore[arg-type]


def test_infeasible_carries_the_ranges() -> None:
    error = InfeasibleBudget("no", {"flops": (1.0, 2.0)})
    assert isinstance(error, ValueError)
    assert error.ranges == {"flops": (1.0, 2.0)}
