"""The docs site builds strictly, and its API page has every public name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import controlprune as cp

ROOT = Path(__file__).parents[2]


def test_the_api_page_has_every_public_name() -> None:
    listed = set(re.findall(r"^::: controlprune\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.M))
    assert listed == set(cp.__all__) - {"__version__"}


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    assert "controlprune.attach" in page
