"""The compiled polynomial against `extents.size`, term by term."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlprune.cost.flops import flops
from controlprune.cost.params import parameters
from controlprune.cost.polynomial import Polynomial
from controlprune.structure.extents import Concat, Extent, Fixed, Product, Units, size
from controlprune.structure.groups import Group, Structure, Work

GROUPS = 4
SIZES = (7, 12, 30, 5)

leaves = st.one_of(
    st.integers(1, 9).map(Fixed),
    st.integers(0, GROUPS - 1).map(lambda g: Units(g, SIZES[g])),
)
extents: st.SearchStrategy[Extent] = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda x: Product(tuple(x))),
        st.lists(inner, min_size=1, max_size=3).map(lambda x: Concat(tuple(x))),
    ),
    max_leaves=5,
)
term_lists = st.lists(
    st.tuples(st.integers(1, 1000), st.lists(extents, max_size=3).map(tuple)), min_size=1, max_size=5
)
width_vectors = st.tuples(*(st.integers(1, n) for n in SIZES))


def by_hand(terms: list[tuple[int, tuple[Extent, ...]]], widths: tuple[int, ...]) -> int:
    return sum(a * math.prod(size(extent, widths) for extent in factors) for a, factors in terms)


@settings(max_examples=100, deadline=None)
@given(term_lists, width_vectors)
def test_value_is_exact(terms, widths) -> None:
    polynomial = Polynomial.of(terms, GROUPS)
    expected = by_hand(terms, widths)
    if expected < 2**53:
        assert polynomial.value(widths) == expected
    assert polynomial.values([widths, SIZES])[0] == polynomial.value(widths)


@settings(max_examples=100, deadline=None)
@given(term_lists, width_vectors, st.data())
def test_marginals_are_differences(terms, widths, data) -> None:
    polynomial = Polynomial.of(terms, GROUPS)
    steps = data.draw(st.tuples(*(st.integers(-3, n) for n in widths)))
    marginals = polynomial.marginals(widths, steps)
    for g, step in enumerate(steps):
        less = tuple(n - step * (g == h) for h, n in enumerate(widths))
        expected = by_hand(terms, widths) - by_hand(terms, less)
        assert marginals[g] == pytest.approx(expected, rel=1e-12, abs=1e-3)
        assert polynomial.marginal(widths, g, step) == marginals[g]


@settings(max_examples=30, deadline=None)
@given(term_lists, term_lists, width_vectors)
def test_sum_and_multiple(first, second, widths) -> None:
    total = 3 * Polynomial.of(first, GROUPS) + Polynomial.of(second, GROUPS)
    assert total.value(widths) == pytest.approx(3 * by_hand(first, widths) + by_hand(second, widths))


def test_like_terms_meet() -> None:
    a, b = Units(0, 7), Units(1, 12)
    terms = [(2, (a, b)), (6, (b, Fixed(5), a)), (1, (Product((Fixed(4), a)), b))]
    polynomial = Polynomial.of(terms, GROUPS)
    assert polynomial.coefficients.tolist() == [36.0]


def test_constant_and_empty() -> None:
    assert Polynomial.of([(3, (Fixed(5),))], 0).value([]) == 15
    assert Polynomial.of([], 2).value([4, 4]) == 0
    assert Polynomial.of([], 2).marginals([4, 4], [1, 1]).tolist() == [0, 0]


def test_group_out_of_range() -> None:
    with pytest.raises(ValueError, match="group 3"):
        Polynomial.of([(1, (Units(3, 9),))], 2)
    with pytest.raises(ValueError, match="cannot be added"):
        Polynomial.of([], 2) + Polynomial.of([], 3)


def test_structure_costs_of_an_mlp() -> None:
    """64-304-10 by hand: 2·B·(64 n + 10 n) FLOPs and 64 n + n + 10 n + 10 parameters."""
    hidden = Units(0, 304)
    structure = Structure(
        groups=(Group("hidden", 304, "neuron", ()),),
        refused=(),
        tensors={
            "1.weight": (hidden, Fixed(64)),
            "1.bias": (hidden,),
            "2.weight": (Fixed(10), hidden),
            "2.bias": (Fixed(10),),
            "steps": (),
        },
        parameters=frozenset({"1.weight", "1.bias", "2.weight", "2.bias"}),
        attributes=(),
        work=(
            Work("1", "addmm", 2, (Fixed(32), Fixed(64), hidden)),
            Work("2", "addmm", 2, (Fixed(32), hidden, Fixed(10))),
        ),
    )
    assert flops(structure).value([100]) == 2 * 32 * (64 + 10) * 100
    assert parameters(structure).value([100]) == 64 * 100 + 100 + 10 * 100 + 10
    assert np.array_equal(parameters(structure).marginals([100], [8]), [75 * 8])
