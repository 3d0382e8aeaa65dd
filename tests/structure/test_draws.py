"""The masks that the numeric check tries: odd widths, and widths that meet."""

from __future__ import annotations

import torch
from torch import nn

from controlprune.structure import analyse
from controlprune.structure.draws import draws, rounded


def structure_of(*widths: int):
    layers = [nn.Linear(a, b) for a, b in zip((16, *widths), (*widths, 10), strict=True)]
    return analyse(nn.Sequential(*layers), torch.randn(2, 16), check=False)


def test_odd_widths_first():
    for seed in range(20):
        for mask in draws(structure_of(2, 3, 32, 33), seed, meetings=0)[0]:
            live = int(mask.sum())
            assert live % 2 == 1
            assert live < len(mask)


def test_wider_groups_meet_the_commonest_sizes_and_narrower_ones_stay_on():
    structure = structure_of(32, 64, 32, 12, 2)
    meeting = draws(structure, 0, meetings=3)[-3:]
    widths = [[int(mask.sum()) for mask in draw] for draw in meeting]
    assert widths[0] == [32, 32, 32, 12, 2]  # 32 stands in most dimensions of the layers
    assert [12, 12, 12, 12, 2] in widths
    assert [2, 2, 2, 2, 2] in widths


def test_corners():
    structure = structure_of(32, 3, 2, 9)
    _, even, ones, one, other, least = (
        [int(mask.sum()) for mask in draw] for draw in draws(structure, 0, meetings=0)
    )
    assert even[1:3] == [2, 2]
    assert all(width % 2 == 0 for width in even)
    assert ones == [1] * 4
    assert least == [2, 1, 1, 1]
    for first, second in zip(one, other, strict=True):
        assert min(first, second) == 1
        assert max(first, second) % 2 == 0


def test_rounding_keeps_what_is_on():
    mask = torch.arange(32) < 9
    assert int(rounded(mask, 8).sum()) == 16
    assert rounded(torch.ones(32, dtype=torch.bool), 8).all()
    assert int(rounded(torch.arange(32) < 31, 8).sum()) == 24
    assert rounded(mask, 1) is mask


def test_no_fewer_units_than_the_model_picks():
    mask = torch.arange(16) == 5
    assert rounded(mask, 1, least=3).sum() == 3
    assert rounded(mask, 8, least=3).sum() == 8
    assert rounded(mask, 1, least=3)[5]
    assert rounded(torch.ones(2, dtype=torch.bool), 1, least=3).all()
