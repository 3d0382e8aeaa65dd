"""The demo keeps what its page promises: minutes, near the dense accuracy, clearly less time to train."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from controlprune.app.cli import main


@pytest.mark.slow
def test_the_demo_is_level_with_dense_in_much_less_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.process_time()
    assert main(["demo", "--out", str(tmp_path)]) == 0
    assert time.process_time() - began < 120
    table = capsys.readouterr().out
    print(table)
    sides = {}
    for line in table.splitlines():
        if found := re.match(r"(dense|controlled|same size from scratch) +([\d.]+) % ", line):
            sides[found[1]] = float(found[2]), float(line.split(" s ")[1].split()[0])
    assert sides["controlled"][0] >= sides["dense"][0] - 0.3
    assert sides["controlled"][1] < 0.65  # 0.6 is what is meant; a busy machine adds
    assert (tmp_path / "dynamics.png").stat().st_size > 10_000
