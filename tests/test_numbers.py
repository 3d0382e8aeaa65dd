"""The table of numbers that steer (docs/architecture.md): each is where it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import controlprune

PACKAGE = Path(controlprune.__file__).parent
PAGE = PACKAGE.parent / "docs" / "architecture.md"
ROWS = re.findall(r"^\| (`.*?`.*?) \| (`.*?`.*?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def test_there_is_a_table() -> None:
    assert len(ROWS) > 15


@pytest.mark.parametrize(("numbers", "files"), ROWS)
def test_each_number_is_where_the_table_says(numbers: str, files: str) -> None:
    names = re.findall(r"`([^`]+)`", files)
    rooms = [Path(name).parent for name in names if "/" in name]
    paths = [PACKAGE / name if "/" in name else PACKAGE / rooms[0] / name for name in names]
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    for name, value in re.findall(r"`(\w+)(?:=([\d.]+))?`", numbers):
        assert re.search(rf"\b{name}\b", text), name
        if value:
            assert re.search(rf"\b{name}\b[^\n=]* = {re.escape(value)}\b", text), f"{name}={value}"
