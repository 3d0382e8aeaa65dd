"""Whole training runs over the zoo: trained under a budget, made small, saved, loaded with equal output."""

from __future__ import annotations

import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations inside the libraries, as they are imported and as they run
    from zoo.tables import TRAINED, tables
    from zoo.train import Trained, train

    TABLES = tables()

pytestmark = pytest.mark.filterwarnings("ignore")
MODELS = {name: factory for table in TABLES.values() for name, factory in table.items()}


@pytest.mark.parametrize("name", [name for name in TRAINED if name in MODELS])
def test_one_of_each_kind_runs_to_its_budget(name: str) -> None:
    result = train(MODELS[name])
    assert result.status == "small", result


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_model_runs_to_its_budget(name: str) -> None:
    result = train(MODELS[name])
    assert result.status in ("small", "refused"), result


def test_a_run_that_misses_is_no_success() -> None:
    met = Trained(budget=0.5, used=0.5, observed=3)
    assert met.status == "small"
    for wrong in (
        Trained(budget=0.5, used=0.51, observed=3),
        Trained(budget=0.5, used=0.5, observed=0),
        Trained(budget=0.5, used=0.5, observed=3, different=1e-3),
    ):
        assert wrong.status == "WRONG"
