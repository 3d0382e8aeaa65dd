"""Whole training runs over the zoo: trained under a budget, made small, saved, loaded with equal output."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations inside the libraries, as they are imported and as they run
    from zoo.__main__ import main as zoo
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


@pytest.mark.parametrize("granularity", ["weight", "layer"])
def test_a_stopped_pass_goes_on(granularity: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By any granularity; what is in the file is not run again, unless it was run otherwise."""
    arguments = ["--train", "--granularity", granularity, "--out", str(tmp_path / "zoo.json")]
    zoo(["resmlp", *arguments])
    first = (tmp_path / "zoo.json").read_text()
    assert json.loads(first)["resmlp"]["status"] == "small"
    zoo(["resmlp", *arguments])
    assert (tmp_path / "zoo.json").read_text() == first
    zoo(["lenet", *arguments, "--seed", "1"])
    rows = json.loads((tmp_path / "zoo.json").read_text())
    assert rows.keys() == {"lenet"}
    assert rows["lenet"]["status"] == ("small" if granularity == "weight" else "refused")
    assert "1 models trained: small 1" in capsys.readouterr().out


def test_a_run_that_misses_is_no_success() -> None:
    met = Trained(budget=0.5, used=0.5, observed=3)
    assert met.status == "small"
    for wrong in (
        Trained(budget=0.5, used=0.51, observed=3),
        Trained(budget=0.5, used=0.5, observed=0),
        Trained(budget=0.5, used=0.5, observed=3, different=1e-3),
    ):
        assert wrong.status == "WRONG"
