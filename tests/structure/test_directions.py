"""Norms that are a direction times a number, and what dormant channels become beside a single live one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from controlprune.structure import analyse
from controlprune.structure.formula import answer, recognised

from .agreement import worst


class Scaled(nn.Module):
    """A direction times the root of the number of its channels, as it is or as it was."""

    def __init__(self, width: int, *, kept: bool, axis: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.rand((1, width, 1, 1) if axis == 1 else (width,)) + 0.5)
        self.scale, self.axis = width**0.5 if kept else None, axis

    def forward(self, x: Tensor) -> Tensor:
        scale = x.shape[self.axis] ** 0.5 if self.scale is None else self.scale
        return F.normalize(x, dim=self.axis) * self.g * scale


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("axis", [1, -1])
def test_what_it_divides_by_with_channels_gone_is_found_out(kept: bool, axis: int) -> None:
    torch.manual_seed(0)
    module, small = (Scaled(n, kept=kept, axis=axis) for n in (8, 5))
    formula = recognised(module)[""]
    assert (formula.axis, formula.centred, formula.gain) == (axis, False, "g")
    assert formula.kept == (8 if kept else None)
    small.g.data, small.scale = module.g.data.narrow(axis, 0, 5), module.scale
    x = torch.randn((2, 8, 3, 4) if axis == 1 else (2, 3, 8))
    mine = answer(module, formula, x, torch.arange(8) < 5).narrow(axis, 0, 5)
    torch.testing.assert_close(mine, small(x.narrow(axis, 0, 5)))


@pytest.mark.parametrize("kept", [True, False])
def test_channels_under_such_a_norm_leave(kept: bool) -> None:
    torch.manual_seed(0)
    norm = Scaled(8, kept=kept, axis=1)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.SiLU(), nn.Conv2d(8, 2, 1)), torch.randn(2, 3, 4, 4)
    structure = analyse(model, x)
    assert structure.sizes == (8,), structure.refused
    assert worst(model, x, structure) < 1e-5


@pytest.mark.parametrize("module", [nn.LayerNorm(8, 1e-12), nn.GroupNorm(1, 8), nn.RMSNorm(8)])
def test_next_to_one_live_channel_dormant_ones_stay_finite_layer_by_layer(module: nn.Module) -> None:
    torch.manual_seed(0)
    formula, live = recognised(module)[""], torch.arange(8) < 1
    x = 10 * torch.randn((2, 8, 3, 3) if formula.axis == 1 else (2, 3, 8))
    with torch.no_grad():
        for _ in range(30):
            x = x + answer(module, formula, x, live)
    assert x.isfinite().all()
    assert x.abs().max() < 1000
