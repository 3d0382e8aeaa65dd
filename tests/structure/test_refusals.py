"""What is left alone is told in words that say why, by the structure and by the controller's report."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

import controlprune as cp
from controlprune.plant.plant import Plant
from controlprune.structure import analyse

from .models import CASES
from .models.experts import GroupedProducts
from .models.guarded import GUARDS
from .test_awkward import build

NORM = "a norm takes statistics over it: with units off, the others would be normalised differently"
HEADS = "nn.MultiheadAttention with add_bias_kv or add_zero_attn has keys of its own: no head can leave"
PICKED = "single positions of it are picked out by index"
SOFTMAX = "softmax runs over its units: with one off, the others would weigh more"

TOLD = (  # case, what is refused, its size, why
    ("multihead_keys", "attend", 3, HEADS),
    ("rms_norm", "scale", 8, "its units are reduced to one number (mean)"),
    ("function_norm", "enter", 8, NORM),
    ("gqa_native", "q", 6, "two activations are multiplied and summed over it (as queries and keys are)"),
    ("softmax_written", "first", 8, SOFTMAX),
    ("experts", "router", 3, "eq takes which: the model's code may tell them by number"),
    ("expert_slabs", "router", 4, "(topk): one that is off would still take a place"),
    ("expert_slabs", "up", 4, PICKED),
    ("flip", "first", 8, "its positions change places"),
    ("frozen_branch", "frozen", 6, "what computes it is frozen"),
    ("tied_embedding", "embed", 11, "its rows are looked up by index"),
    ("lstm_projected", "cells", 8, "nn.LSTM with proj_size"),
    ("unknown_operator", "first", 8, "operator controlprune_test::blur has no rule"),
    ("scaled_by_width", "a", 8, "the numeric check failed: masked and shrunk outputs differ"),
    ("lora", "out", 2, "an output of the model"),
)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(("case", "name", "size", "reason"), TOLD, ids=[f"{t[0]}-{t[1]}" for t in TOLD])
def test_what_is_refused_and_why(case: str, name: str, size: int, reason: str) -> None:
    model, inputs = build(case)
    refused = analyse(model, inputs).refused
    assert any((r.name, r.size) == (name, size) and reason in r.reason for r in refused), refused


def test_grouped_experts_stay_whole_and_their_neurons_go_in_the_kernels_steps() -> None:
    torch.manual_seed(0)
    structure = analyse(GroupedProducts(32), torch.randn(5, 8))
    assert [(g.name, g.size, g.multiple) for g in structure.groups] == [("up", 32, 8)]
    assert structure.forwards < 20
    told = {r.name: r.reason for r in structure.refused if r.size == 4}
    assert told["up"].startswith(
        "a router picks whole experts by index: one that is off would still be picked"
    )
    assert "(topk)" in told["router"]


def test_masks_by_hand_keep_to_the_kernels_steps() -> None:
    torch.manual_seed(0)
    model = GroupedProducts(32)
    plant = Plant(model, None, analyse(model, torch.randn(5, 8)))
    with pytest.raises(ValueError, match="'up' has 9 active units; the model's code takes multiples of 8"):
        plant.apply([torch.arange(32) < 9], compact=False)
    plant.apply([torch.arange(32) < 8], compact=True)


class Literal(nn.Module):
    """Sizes written down, in ways that people write them."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.qkv, self.mix = 4, nn.Linear(12, 36), nn.Linear(12, 12)
        self.enter, self.flat = nn.Conv2d(1, 20, 3), nn.Linear(320, 5)
        self.first, self.last = nn.Linear(5, 16), nn.Linear(6, 2)

    def forward(self, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c)
        h = self.flat(self.enter(image).relu().view(-1, 320))
        _, kept = self.first(h).split([10, 6], 1)
        return self.mix(y), self.last(kept)


def test_a_size_that_is_written_down_is_told_with_its_line_and_what_to_write_instead() -> None:
    torch.manual_seed(0)
    refused = analyse(Literal(), (torch.randn(2, 5, 12), torch.randn(2, 1, 6, 6))).refused
    told = {r.name: r.reason for r in refused if "test_refusals.py:" in r.reason}
    assert ".view(b, t, 3, self.heads, c // self.heads)" in told["qkv"]
    assert (
        "write -1 for the size that shrinks, or a size that the module keeps, as self.head_dim" in told["qkv"]
    )
    assert ".view(-1, 320)" in told["enter"]
    assert "write x.flatten(1)" in told["enter"]
    assert "self.first(h).split([10, 6], 1)" in told["first"]
    assert "split by a size that the module keeps, as self.width, or write x.chunk(n, dim)" in told["first"]


class Scaled(nn.Module):
    """`how`: the width as a number that the model computes with."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.enter, self.leave = how, nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        c = h.shape[-1]
        match self.how:
            case "times":
                h = h * c**-0.5
            case "function":
                h = torch.div(h, c)
            case "argument":
                h = F.leaky_relu(h, 1 / c)
        return self.leave(h)


@pytest.mark.parametrize(
    ("how", "line"),
    [("times", "h = h * c**-0.5"), ("function", "torch.div(h, c)"), ("argument", "F.leaky_relu(h, 1 / c)")],
)
def test_a_size_that_is_computed_with_is_told_with_the_line(how: str, line: str) -> None:
    torch.manual_seed(0)
    (told,) = (r.reason for r in analyse(Scaled(how), torch.randn(4, 5)).refused if r.name == "enter")
    assert "make that a number it keeps, as self.scale; test_refusals.py:" in told
    assert line in told


class Standardised(nn.Conv2d):
    """Weights of mean 0 and deviation 1, over all that they read."""

    def forward(self, input: Tensor) -> Tensor:
        flat = self.weight.reshape(1, len(self.weight), -1)
        weight = F.batch_norm(flat, None, None, training=True).reshape_as(self.weight)
        return self._conv_forward(input, weight, self.bias)


def test_weights_that_are_standardised_are_told_as_such() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), Standardised(6, 2, 3))
    told = {(r.name, r.size): r.reason for r in analyse(model, torch.randn(2, 1, 8, 8)).refused}
    assert told["0", 6].startswith("a weight is computed from all of it (standardised?)")


def test_a_norm_written_as_a_function_is_told_with_what_to_write() -> None:
    model, inputs = build("rms_norm")
    (told,) = (r.reason for r in analyse(model, inputs).refused if r.name == "scale")
    assert "a module that computes a norm alone, as nn.RMSNorm" in told


class CutUp(nn.Module):
    """Its rows go to the next layer one by one, in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = self.enter(x).split(1, 1)
        return self.leave(torch.cat([b, d, a, c], 1))


def test_a_width_that_is_cut_into_single_positions_is_told() -> None:
    torch.manual_seed(0)
    refused = {(r.name, r.size): r.reason for r in analyse(CutUp(), torch.randn(3, 5)).refused}
    assert "cuts it into single positions" in refused["enter", 4]


def test_a_size_that_is_asked_for_is_told_with_the_line() -> None:
    torch.manual_seed(0)
    refused = {r.name: r.reason for r in analyse(GUARDS["even"](), torch.randn(4, 5)).refused}
    assert refused["first"].endswith('"even": _when(lambda h: h.shape[1] % 2 == 0),')


def test_a_branch_that_does_not_run_is_told_as_such() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.spare, self.out = nn.Linear(5, 8), nn.Linear(5, 7), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.first(x).relu())

    refused = {(r.name, r.size, r.reason) for r in analyse(Spare(), torch.randn(3, 5)).refused}
    assert ("spare", 7, "the forward on the example inputs does not use it") in refused


def test_the_report_tells_the_same() -> None:
    torch.manual_seed(0)
    model, inputs = build("encoder_layer")
    optimizer, budget = SGD(model.parameters(), 0.1), cp.Budget(flops=0.9)
    controller = cp.attach(model, optimizer, budget=budget, example_inputs=inputs, total_steps=10)
    lines = controller.report().splitlines()
    assert any(line.strip().startswith(f"refused layer.self_attn (3): {PICKED}") for line in lines)
    assert any(line.strip().startswith("traced and checked in ") for line in lines)
    assert any("refused layer.self_attn.out_proj (12): an input of the model" in line for line in lines)


def test_every_refusal_has_a_reason() -> None:
    for name in CASES:
        model, inputs = build(name)
        assert all(refusal.reason and refusal.name for refusal in analyse(model, inputs, check=False).refused)
