"""analysis/gpu.py at toy sizes on a CPU: that every section runs, is not run twice, and keeps its time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from analysis.gpu import SECTIONS, main
from analysis.measure import Results


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


def test_a_piece_is_run_once_and_none_is_begun_late(tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    assert rows(path, "native", "--minutes", "0") == []
    found = rows(path, "n_m", "layers")
    assert [row["piece"] for row in found] == ["256 fp16", "gpt 0.75", "gpt 0.5"]
    assert "GPU" in found[0]["refused"]
    assert 0.0 < found[2]["flops"] <= 0.5
    assert rows(path, "n_m", "layers") == found
