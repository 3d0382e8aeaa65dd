"""Models as people write them, with sizes in loops, lists, slices and keys: refused or right, never wrong."""

from __future__ import annotations

import pytest
import torch

from controlprune.structure import analyse

from .agreement import disagreement, worst
from .models.written import WRITTEN

PRUNED = {  # those that leave something to prune, and what
    "WidthsAsProperties": (6,),
    "Ellipses": (2, 4, 12),
    "WrittenInPlace": (6,),
    "Tied": (12,),
    "StackOfList": (3, 3),
    "ScaledByRoot": (12,),
    "BankOfColumns": (7, 12),
    "MaskOfWidth": (12,),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_no_width_pattern_and_no_unit_is_wrong(name: str) -> None:
    torch.manual_seed(0)
    model, x = WRITTEN[name](), torch.randn(4, 5)
    structure = analyse(model, x)
    assert tuple(sorted(structure.sizes)) == PRUNED.get(name, ()), structure.refused
    assert worst(model, x, structure) < 1e-5
    for seed in range(3 if structure.groups else 0):
        assert disagreement(model, (x,), structure, seed) < 1e-5
