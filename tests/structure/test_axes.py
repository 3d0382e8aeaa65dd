"""Axes: cutting and merging index spaces, position by position."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlprune.structure.tape.axes import (
    Axis,
    Misfit,
    concat,
    leaves,
    pin,
    product,
    regroup,
    segment,
    unify,
)


def positions(axis: Axis) -> list[tuple[object, ...]]:
    """What stands at each position: one (leaf, index) per leaf that it is made of."""
    axis = axis.root
    if axis.parts:
        return [p for part in axis.parts for p in positions(part)]
    out: list[tuple[object, ...]] = [()]
    if axis.factors:
        for factor in axis.factors:
            out = [a + b for a in out for b in positions(factor)]
        return out
    return [((axis, i),) if axis.size > 1 else () for i in range(axis.size)]


def test_a_leaf_cut_later_keeps_what_was_built_on_it():
    leaf, other = Axis(12), Axis(5)
    both = concat([leaf, other])
    outer, inner = regroup([leaf], [3, 4])
    assert [axis.size for axis in leaves(both)] == [3, 4, 5]
    assert positions(both)[:12] == positions(product([outer, inner]))


def test_reshape_and_back_is_the_same_space():
    a, b = Axis(6), Axis(4)
    flat = regroup([a, b], [24])
    assert [axis.root for axis in regroup(flat, [6, 4])] == [a, b]


def test_split_of_a_leaf_and_cat_again():
    a = Axis(10)
    pieces = segment(a, [3, 7])
    assert positions(concat(pieces)) == positions(a)


def test_equal_segments_against_a_product_are_one_space():
    parts = [Axis(4) for _ in range(3)]
    outer, inner = regroup([concat(parts)], [3, 4])
    assert {part.root for part in parts} == {inner.root}
    assert outer.reason is not None


def test_segments_of_a_product_at_uneven_places_write_it_out():
    k, x = Axis(3), Axis(4)
    first, second = segment(product([k, x]), [6, 6])
    assert k.reason
    assert x.reason is None
    assert positions(first) + positions(second) == positions(concat([x, x, x]))


def test_a_pin_reaches_every_leaf_and_what_a_pinned_leaf_is_cut_to():
    a, b = Axis(6), Axis(2)
    pin(concat([a, b]), "because")
    assert all(leaf.reason == "because" for leaf in regroup([a], [2, 3]))


def test_unify_moves_a_pin():
    a, b = Axis(6, "fixed"), Axis(6)
    regroup([b], [2, 3])
    unify(a, b)
    assert {leaf.reason for leaf in leaves(b)} == {"fixed"}


def test_what_cannot_agree_is_pinned():
    a, b = product([Axis(2), Axis(3)]), product([Axis(3), Axis(2)])
    unify(a, b)
    assert all(leaf.reason for leaf in leaves(a) + leaves(b))
    with pytest.raises(Misfit):
        regroup([a], [3, 2])


sizes = st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4)


@given(sizes, sizes, st.randoms(use_true_random=False))
def test_cuts_agree_with_positions(shape, other, random):
    """Regrouped axes multiply out to the same positions as before, whatever the order of cuts."""
    axes = [Axis(size) for size in shape]
    flat = product(axes)
    total = flat.size
    sizes = list(other)
    if total % max(1, _product(sizes)):
        return
    sizes.append(total // _product(sizes))
    try:
        pieces = regroup([flat], sizes)
    except Misfit:
        return
    assert [piece.size for piece in pieces] == sizes
    assert positions(product(pieces)) == positions(product(axes))


def _product(sizes: list[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), st.data())
def test_unify_makes_positions_equal(parts, data):
    """After unify, both axes hold the same at every position (or both are pinned)."""
    a = concat([Axis(size) for size in parts])
    order = data.draw(st.permutations(parts))
    b = concat([Axis(size) for size in order])
    unify(a, b)
    if not any(leaf.reason for leaf in leaves(a)):
        assert positions(a) == positions(b)
