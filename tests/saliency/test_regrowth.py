"""Single weights: what is on by its curvature, and no more may come back than a share of a layer."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from controlprune.saliency.network import Statistics, first_guess
from controlprune.saliency.regrowth import EDGE, regrowth


def statistics(mean: Tensor, curvature: Tensor, on: Tensor, group: Tensor) -> Statistics:
    one = torch.ones(len(mean))
    return Statistics(mean, curvature, one, one[:0], 20 * one, one, one, on, group, 0.0, 0.5)


@given(st.integers(0, 1000), st.floats(0.0, 1.0))
@settings(max_examples=50, deadline=None)
def test_the_most_wanted_take_the_places_of_the_least(seed: int, share: float) -> None:
    torch.manual_seed(seed)
    mean, curvature, on = torch.randn(60), torch.rand(60) + 0.1, torch.rand(60) < 0.4
    group = torch.arange(60) // 20
    on[::20] = True
    known = statistics(mean, curvature, on, group)
    guess = first_guess(known)
    values = regrowth(guess, known, [0, 2], share)
    assert torch.equal(values[group == 1], guess[group == 1])  # channels, say
    for g in (0, 2):
        live, away = (group == g) & on, (group == g) & ~on
        assert torch.equal(values[live], curvature[live] / 2)
        k = min(int(share * int(live.sum())), int(away.sum()))
        back = values[away].sort(descending=True)
        torch.testing.assert_close(back.values[:k], (1 + EDGE) * values[live].sort().values[:k].flip(0))
        assert bool((back.values[k:] < 1e-20).all())
        wanted = mean[away].abs()
        assert set(back.indices[:k].tolist()) == set(wanted.topk(k).indices.tolist())


def test_what_was_never_wanted_stays_away() -> None:
    on = torch.tensor([True, True, False, False])
    known = statistics(torch.zeros(4), torch.ones(4), on, torch.zeros(4, dtype=torch.int64))
    assert float(regrowth(first_guess(known), known, [0], 1.0)[2:].max()) < 1e-20
