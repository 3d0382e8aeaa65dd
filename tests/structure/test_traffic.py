"""What operators write and allocate: by hand, and as a fresh trace of the shrunk model says."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from controlprune.structure import Work, analyse, without
from controlprune.structure.extents import size

from .agreement import random_masks, shrunk_copy
from .models import CASES
from .test_awkward import build


def total(terms: Sequence[Work], widths: Sequence[int] | None = None) -> int:
    return sum(w.coefficient * math.prod(size(f, widths) for f in w.factors) for w in terms)


def test_an_mlp_by_hand():
    """Each linear writes its output, the ReLU too; flatten is a view; dropout's mask is for training only."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    structure = analyse(net, (torch.randn(5, 2, 3),))
    assert [w.operator for w in structure.traffic] == ["aten::addmm", "aten::relu", "aten::addmm"]
    assert total(structure.traffic) == 4 * 5 * (8 + 8 + 3)
    assert total(structure.traffic, [3]) == 4 * 5 * (3 + 3 + 3)
    trained = [w.where for w in structure.activations]
    assert trained[:2] == ["1", "2"]
    assert trained[-1] == "4"
    assert set(trained[2:-1]) == {"3"}


def test_in_place_is_written_but_not_allocated():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    structure = analyse(net, (torch.randn(5, 6),))
    assert total(structure.traffic) == 4 * 5 * (8 + 8 + 3)
    assert total(structure.activations) == 4 * 5 * (8 + 3)


def test_like_terms_are_added():
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            x = self.a(x)
            return self.b(torch.relu(torch.relu(torch.relu(x))))

    structure = analyse(Repeated(), (torch.randn(5, 4),))
    assert [w.coefficient for w in structure.traffic if w.operator == "aten::relu"] == [12]
    assert [w.coefficient for w in structure.activations if w.operator == "aten::relu"] == [4, 4, 4]


@pytest.mark.parametrize("name", CASES)
def test_the_shrunk_model_writes_what_the_polynomial_says(name: str):
    model, inputs = build(name)
    structure = analyse(model, inputs)
    masks = random_masks(structure, 5)
    widths = [int(m.sum()) for m in masks]
    small = analyse(shrunk_copy(model, structure, masks), inputs, check=False)
    assert total(structure.traffic, widths) == total(small.traffic)
    assert total(structure.activations, widths) == total(small.activations)


def test_refused_groups_become_fixed():
    model, inputs = build("residual") if "residual" in CASES else build(next(iter(CASES)))
    structure = analyse(model, inputs)
    fixed = without(structure, dict.fromkeys(range(len(structure.groups)), "a test"))
    assert total(fixed.traffic, []) == total(structure.traffic)
    assert total(fixed.activations, []) == total(structure.activations)
