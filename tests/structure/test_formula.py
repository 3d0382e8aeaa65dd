"""Which modules are norms is found out by trying them; statistics are of the live channels alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import OwnNorm
from torch import Tensor, nn

from controlprune.structure.formula import answer, formula_of, recognised


class ChannelsFirst(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.movedim(-1, 1)


class ChannelsFirstInLine(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 1)).permute(0, 2, 1)


class Bare(nn.Module):
    """Nothing but its size is there to be read."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class Deviation(nn.Module):
    """Divides by the deviation, eps outside of the root: another equation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.std(-1, keepdim=True) + self.eps)


class Direction(nn.Module):
    """Of no length at all, which is no mean over channels."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


class Rounded(OwnNorm):
    """In float32 inside, and back."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class GatedBefore(OwnNorm):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x if gate is None else x * F.silu(gate))


class GatedAfter(OwnNorm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return super().forward(x) * F.silu(gate)


class Pieces(nn.Module):
    """RMSNorm of every group by itself, channels last: its groups are told by their size, as in Mamba-2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.group_size, self.epsilon = nn.Parameter(torch.ones(8)), 4, 1e-5

    def forward(self, x: Tensor) -> Tensor:
        pieces = x.unflatten(-1, (-1, self.group_size))
        return self.weight * F.rms_norm(pieces, pieces.shape[-1:], None, self.epsilon).flatten(-2)


NORMS = {
    "layer": (nn.LayerNorm(8), (-1, 0, True, 1e-5, "weight", "bias", 0.0)),
    "layer without bias": (nn.LayerNorm(8, 1e-12, bias=False), (-1, 0, True, 1e-12, "weight", None, 0.0)),
    "layer without either": (nn.LayerNorm(8, elementwise_affine=False), (-1, 0, True, 1e-5, None, None, 0.0)),
    "rms": (nn.RMSNorm(8, 1e-6), (-1, 0, False, 1e-6, "weight", None, 0.0)),
    "rms of its dtype's eps": (nn.RMSNorm(8), (-1, 0, False, None, "weight", None, 0.0)),
    "group": (nn.GroupNorm(2, 8), (1, 2, True, 1e-5, "weight", "bias", 0.0)),
    "group of all": (nn.GroupNorm(1, 8, affine=False), (1, 1, True, 1e-5, None, None, 0.0)),
    "channels first": (ChannelsFirst(8), (1, 0, True, 1e-5, "weight", "bias", 0.0)),
    "channels first in line": (ChannelsFirstInLine(8), (1, 0, True, 1e-5, "weight", "bias", 0.0)),
    "eps in its code": (Bare(), (-1, 0, True, 1e-6, None, None, 0.0)),
    "gain above one": (OwnNorm(8), (-1, 0, False, 1e-6, "weight", None, 1.0)),
    "rms of each of two": (Pieces(), (-1, 2, False, 1e-5, "weight", None, 0.0)),
    "rounded inside": (Rounded(8), (-1, 0, False, 1e-6, "weight", None, 1.0)),
}
OTHERS = {
    "two dimensions": nn.LayerNorm((3, 8)),
    "batch": nn.BatchNorm1d(8),
    "deviation": Deviation(),
    "dropout": nn.Dropout(0.05),
    "direction": Direction(),
    "slope": nn.LeakyReLU(0.01),
    "linear": nn.Linear(8, 8),
    "nothing": nn.Identity(),
}


def shape(name: str) -> tuple[int, ...]:
    if "in line" in name:
        return 2, 8, 5
    return (2, 3, 8) if NORMS[name][1][0] == -1 else (2, 8, 3, 4)


@pytest.mark.parametrize("name", NORMS)
def test_what_a_norm_computes_is_found_out(name: str) -> None:
    module, expected = NORMS[name]
    formula = recognised(module)[""]
    found = (formula.axis, formula.groups, formula.centred, formula.eps)
    assert (*found, formula.gain, formula.bias, formula.offset) == expected
    x = torch.randn(shape(name), dtype=torch.float64)
    everything = torch.ones(8, dtype=torch.bool)
    with torch.no_grad():
        module = module.double()
        torch.testing.assert_close(answer(module, formula, x, everything), module(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_such_norm_is_left_alone(name: str) -> None:
    assert not recognised(OTHERS[name])


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_the_answer_has_the_modules_own_dtype(name: str, autocast: bool, given: torch.dtype) -> None:
    module = NORMS[name][0].float()
    formula = recognised(module)[""]
    x = torch.randn(shape(name)).to(given)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mine, its = answer(module, formula, x, torch.ones(8, dtype=torch.bool)), module(x)
    assert mine.dtype == its.dtype
    torch.testing.assert_close(mine, its, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", NORMS)
def test_dormant_channels_count_for_nothing_and_get_no_gradient_but_are_normalised(name: str) -> None:
    module = NORMS[name][0].double()
    formula = recognised(module)[""]
    live = torch.tensor([True, False, True, True, True, True, True, False])
    x = torch.randn(shape(name), dtype=torch.float64, requires_grad=True)
    y = answer(module, formula, x, live)
    heard = y.index_select(formula.axis, live.nonzero().flatten())
    heard.square().sum().backward()
    assert x.grad is not None
    off = (~live).nonzero().flatten()
    assert not x.grad.index_select(formula.axis, off).any()
    moved = x.detach().clone()
    moved.index_add_(formula.axis, off, torch.ones_like(moved).narrow(formula.axis, 0, len(off)))
    again = answer(module, formula, moved, live)
    torch.testing.assert_close(again.index_select(formula.axis, live.nonzero().flatten()), heard)
    assert not torch.allclose(again, y)


def test_a_group_that_is_off_whole_makes_no_holes() -> None:
    live = torch.tensor([False] * 4 + [True] * 4)
    module = nn.GroupNorm(2, 8)
    formula = formula_of(module)
    assert formula is not None
    assert answer(module, formula, torch.randn(2, 8, 3), live).isfinite().all()


def test_parameters_without_memory_are_tried_on_a_copy_that_has_some() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    assert recognised(model)["1"].centred
    assert all(p.device.type == "meta" for p in model.parameters())


@pytest.mark.parametrize(("module", "when"), [(GatedBefore(8), "before"), (GatedAfter(8), "after")])
def test_a_gate_is_found_where_it_stands(module: nn.Module, when: str) -> None:
    formula = recognised(module)[""]
    assert formula.gate == when
    x, gate = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    everything = torch.ones(8, dtype=torch.bool)
    with torch.no_grad():
        torch.testing.assert_close(answer(module, formula, x, everything, gate), module(x, gate))
