"""`only`: the part of a dimension that reads, as a term; and rows of what was written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from controlprune.structure.extents import Concat, Extent, Fixed, Product, Units, labels, only, size
from controlprune.structure.tape.rows import Rows

UNITS, HEADS = Units(0, 3), Units(1, 2)
EXTENTS: dict[str, tuple[Extent, list[tuple[int, int]]]] = {
    "the second of three blocks": (Product((Fixed(3), HEADS, UNITS)), [(6, 12)]),
    "the first of three in each head": (Product((HEADS, Fixed(3), UNITS)), [(0, 3), (9, 12)]),
    "a piece": (Concat((Product((HEADS, UNITS)), Fixed(4), UNITS)), [(10, 13)]),
    "two pieces of three": (Concat((UNITS, UNITS, UNITS)), [(0, 3), (6, 9)]),
    "keys of one head, after queries of many": (Product((Concat((HEADS, Fixed(2))), UNITS)), [(6, 9)]),
    "all": (Product((HEADS, UNITS)), [(0, 6)]),
    "nothing": (Product((HEADS, UNITS)), []),
}


def positions(extent: Extent, spans: list[tuple[int, int]]) -> Tensor:
    where = torch.zeros(size(extent), dtype=torch.bool)
    for start, stop in spans:
        where[start:stop] = True
    return where


@pytest.mark.parametrize("name", EXTENTS)
def test_units_stand_where_asked_for_and_nowhere_else(name: str) -> None:
    extent, spans = EXTENTS[name]
    where = positions(extent, spans)
    part = only(extent, where)
    assert size(part) == size(extent)
    assert torch.equal(labels(part, 0), torch.where(where, labels(extent, 0), -1))


def test_some_heads_are_no_term() -> None:
    extent = Product((HEADS, UNITS))
    with pytest.raises(ValueError, match="at some of its positions"):
        only(extent, positions(extent, [(0, 3)]))
    with pytest.raises(ValueError, match="at some of its positions"):
        only(UNITS, positions(UNITS, [(0, 2)]))


def test_what_was_written_is_forgotten() -> None:
    rows, weight = Rows(), nn.Parameter(torch.zeros(2, 3))
    rows.own("weight", weight)
    assert [origin.source for (origin,) in rows.of(weight)] == [("weight", 0), ("weight", 1)]
    rows.forget(weight.untyped_storage()._cdata)
    assert rows.of(weight) == ()
