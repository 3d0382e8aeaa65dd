"""The awkward cases: the groups that are expected, and masked equal to shrunk by an independent check."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from controlprune.structure import analyse
from controlprune.structure.extents import size
from controlprune.structure.record import reference_kernels

from .agreement import disagreement, random_masks, run, shrunk_copy
from .models import CASES

WRITTEN = (  # a size, or the width itself, is in the code
    *("heads_by_shape", "dense", "auxiliary_written", "dynamic_weights"),
    *("fixed_filter", "maxout_written", "scaled_by_width", "added_where_it_fits", "alone_is_apart"),
)
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")


def build(name: str) -> tuple[nn.Module, tuple[Tensor]]:
    factory, shape, _ = CASES[name]
    torch.manual_seed(0)
    model = factory().eval()
    return model, (torch.randn(shape) if isinstance(shape, tuple) else shape,)


@pytest.mark.parametrize("name", CASES)
def test_groups(name: str):
    model, inputs = build(name)
    structure = analyse(model, inputs)
    assert sorted(structure.sizes) == sorted(CASES[name][2]), structure.refused


@pytest.mark.parametrize("name", CASES)
def test_masked_equals_shrunk(name: str):
    model, inputs = build(name)
    structure = analyse(model, inputs)
    for seed in range(3 if structure.groups else 0):
        assert disagreement(model, inputs, structure, seed) < 1e-5


@pytest.mark.parametrize("name", [n for n in CASES if n not in WRITTEN])
def test_rules_alone_suffice(name: str):
    """Where no number is written into forward, the rules are exact without the numeric check."""
    model, inputs = build(name)
    assert analyse(model, inputs, check=False).groups == analyse(model, inputs).groups


@pytest.mark.parametrize("name", CASES)
def test_work_is_what_torch_counts(name: str):
    """Dense and shrunk, to the last FLOP."""
    model, inputs = build(name)
    structure = analyse(model, inputs)
    masks = random_masks(structure, 5)
    for widths, net in (
        (structure.sizes, model),
        ([int(m.sum()) for m in masks], shrunk_copy(model, structure, masks)),
    ):
        with reference_kernels(net), FlopCounterMode(display=False) as counter:
            run(net, inputs)
        predicted = sum(w.coefficient * math.prod(size(f, widths) for f in w.factors) for w in structure.work)
        assert predicted == counter.get_total_flops()


def test_training_only_readers_are_slices():
    model, inputs = build("auxiliary_head")
    (group,) = analyse(model, inputs).groups
    assert {part.tensor for part in group.readers} == {"out.weight", "aux.weight"}


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float64])
def test_other_precisions(precision: torch.dtype):
    model, (x,) = build("squeeze_excite")
    model, x = model.to(precision), x.to(precision)
    structure = analyse(model, (x,))
    assert sorted(structure.sizes) == [6, 12]
    assert disagreement(model, (x,), structure) < (0.1 if precision == torch.bfloat16 else 1e-12)


def test_kinds_and_names_are_for_people():
    model, inputs = build("gqa_native")
    groups = {group.name: group.kind for group in analyse(model, inputs).groups}
    assert groups == {"q": "head", "q:2": "head member"}


def test_an_attribute_used_for_sizes_follows():
    model, inputs = build("fused_heads")
    structure = analyse(model, inputs)
    attributes = {(a.module, a.attribute): size(a.extent, [3]) for a in structure.attributes}
    assert attributes[("", "heads")] == 3
    assert ("", "head_dim") not in attributes
    assert attributes[("qkv", "out_features")] == 27


def test_channels_last_reaches_the_classifier():
    """torch's global pool of a channels_last map ends in as_strided_."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    )
    model, x = model.eval(), torch.randn(2, 3, 8, 8)
    plain = analyse(model, (x,))
    last = analyse(
        model.to(memory_format=torch.channels_last), (x.contiguous(memory_format=torch.channels_last),)
    )
    assert last.sizes == plain.sizes == (8,)
