"""Public architectures through the contract: masked = shrunk, expand restores, never silently wrong."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from controlprune.structure import analyse
from controlprune.structure.extents import Extent, Product
from controlprune.structure.groups import Structure

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations inside the libraries, as they are imported and as they run
    from zoo import check as checking
    from zoo import residual
    from zoo.check import Result, error, run, scatter
    from zoo.tables import FAST, tables

    TABLES = tables()

pytestmark = pytest.mark.filterwarnings("ignore")
MODELS = {name: factory for table in TABLES.values() for name, factory in table.items()}


@cache
def _result(name: str) -> Result:
    return run(MODELS[name])


def _explain(name: str, result: Result) -> str:
    reasons = Counter(refusal.reason for refusal in result.refused).most_common(3)
    return f"{name}: {result.status} {result.failure} {replace(result, refused=())} {reasons}"


@pytest.mark.parametrize("name", [name for name in FAST if name in MODELS])
def test_one_of_each_kind_is_handled_fully(name: str) -> None:
    result = _result(name)
    assert result.status == "full", _explain(name, result)


@pytest.mark.parametrize("name", ["nfnet", "gmlp"])
def test_what_is_left_alone_is_said_to_be(name: str) -> None:
    """Weights standardised over the columns that read a unit; a LayerNorm over the units themselves."""
    result = _result(name)
    assert result.status in ("full", "partial", "refused"), _explain(name, result)
    reasons = " ".join(refusal.reason for refusal in result.refused)
    told = ("a norm takes statistics over it", "(mean)", "a weight is computed from all of it")
    assert result.status == "full" or any(reason in reasons for reason in told)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS))
def test_no_model_is_ever_silently_wrong(name: str) -> None:
    result = _result(name)
    assert result.status in ("full", "partial", "refused"), _explain(name, result)


@pytest.mark.slow
def test_nineteen_models_in_twenty_are_handled_fully() -> None:
    shares = {name: [_result(model).status for model in table] for name, table in TABLES.items() if table}
    statuses = Counter(status for column in shares.values() for status in column)
    assert sum(statuses.values()) >= 60
    assert statuses["WRONG"] == 0
    assert statuses["full"] >= 0.95 * sum(statuses.values()), {n: Counter(c) for n, c in shares.items()}


def _trains_alike(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model = scatter(model.eval())
    structure = analyse(model, inputs)
    assert residual.residual_groups(structure), structure.refused
    assert residual.apart_after(5, model, inputs, structure) < 1e-5  # some norms compute in float32


@pytest.mark.parametrize("name", [name for name in residual.FEW if name in MODELS])
def test_the_residual_width_is_a_group_and_trains_alike_in_both_layouts(name: str) -> None:
    _trains_alike(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in residual.FAMILIES if n in MODELS and n not in residual.FEW])
def test_the_residual_width_of_more_families(name: str) -> None:
    _trains_alike(name)


def _reversed(extent: Extent) -> Extent:
    return Product(extent.factors[::-1]) if isinstance(extent, Product) else extent


def test_the_check_sees_a_flatten_taken_in_the_wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    true = checking.analyse

    def wrong(model: nn.Module, inputs: checking.Inputs) -> Structure:
        structure = true(model, inputs)
        tensors = {name: tuple(map(_reversed, dims)) for name, dims in structure.tensors.items()}
        groups = tuple(
            replace(g, slices=tuple(replace(s, extent=_reversed(s.extent)) for s in g.slices))
            for g in structure.groups
        )
        return replace(structure, tensors=tensors, groups=groups)

    monkeypatch.setattr(checking, "analyse", wrong)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    assert run(lambda: (model, (torch.randn(2, 3, 8, 8),))).status == "WRONG"


def test_the_error_is_infinite_where_shapes_or_finiteness_differ() -> None:
    assert error([torch.ones(3)], [torch.ones(2)]) == float("inf")
    assert error([torch.ones(3)], [torch.full((3,), float("nan"))]) == float("inf")
    assert error([torch.ones(3)], []) == float("inf")
    assert error([torch.ones(3)], [torch.full((3,), 1.5)]) == pytest.approx(0.5)


def test_scatter_gives_every_channel_its_own_norm_and_bias() -> None:
    norm = nn.BatchNorm2d(8)
    scatter(norm)
    for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        assert values is not None
        assert len(values.unique()) == 8
