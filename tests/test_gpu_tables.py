"""analysis/gpu.py at toy sizes on a CPU: that every section runs, is not run twice, and keeps its time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from analysis.gpu import SECTIONS, main
from analysis.measure import Results


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `main` sets is put back."""
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "0")


def rows(path: Path, *arguments: str) -> list[dict[str, Any]]:
    main([*arguments, "--device", "cpu", "--quick", "--out", str(path)])
    return Results(path).rows()


@pytest.mark.slow
def test_every_section_runs(tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    found = rows(path)
    assert {row["section"] for row in found} == set(SECTIONS)
    for row in found:
        if row["section"] in ("whole", "layers", "budgets") and "refused" not in row:
            assert row.get("flops", row.get("said", 0.0)) <= 0.75 * 1.05
    assert rows(path) == found


def test_a_piece_that_raises_is_told_and_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: list[Any] = [RuntimeError("no kernel"), {"speed_up": 2.0}]

    def find() -> Any:
        if isinstance(outcome := outcomes.pop(0), Exception):
            raise outcome
        return outcome

    monkeypatch.setattr("analysis.gpu.SECTIONS", {"n_m": lambda card: [("one", find), ("two", dict)]})
    path = tmp_path / "gpu.jsonl"
    failed, other = rows(path, "n_m")
    assert failed["error"] == "RuntimeError: no kernel"
    assert "in find" in failed["traceback"]
    assert (other["piece"], "error" in other) == ("two", False)
    assert [row.get("speed_up") for row in rows(path, "n_m")] == [None, None, 2.0]
    assert len(rows(path, "n_m")) == 3


def test_a_piece_is_run_once_and_none_is_begun_late(tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    assert rows(path, "native", "--minutes", "0") == []
    found = rows(path, "n_m", "layers")
    assert [row["piece"] for row in found] == ["256 fp16", "gpt 0.75", "gpt 0.5"]
    assert "GPU" in found[0]["refused"]
    assert 0.0 < found[2]["flops"] <= 0.5
    assert rows(path, "n_m", "layers") == found
