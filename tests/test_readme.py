"""Every python example of the README and the docs runs as it stands; the two commands are as promised."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = (
    'pip install -c constraints.txt -e ".[demo]" && controlprune demo',
    'pip install -c constraints.txt -e ".[test]" && pytest',
)


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:.*treespec")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_the_examples_of_a_page_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(blocks(page), start=1):
        exec(compile(block, f"{page.name}, example {number}", "exec"), names)


def test_the_readme_has_an_example_and_both_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert blocks(ROOT / "README.md")
    assert all(command in text.splitlines() for command in COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_picture_and_file_a_page_links_to_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


UNDER_TORCHRUN = {"ddp.py"}  # test_killed.py runs it
OF_PROCESSES = ROOT / "examples" / "federated.py"  # they import it again, so it must be a script of its own
SCRIPTS = [
    path
    for path in sorted((ROOT / "examples").glob("*.py"))
    if path.name not in UNDER_TORCHRUN and path != OF_PROCESSES
]


def test_the_federated_example_runs_in_processes_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, str(OF_PROCESSES)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    accuracies = [float(found) for found in re.findall(r"([\d.]+)%$", done.stdout, re.MULTILINE)]
    assert len(accuracies) == 5
    assert min(accuracies) > 70.0  # a guess is right in ten of a hundred
    moved = re.search(r"travelled back: (\d+)%", done.stdout)
    assert moved is not None
    assert int(moved[1]) < 60  # the mean of the budgets, of parameters instead of FLOPs


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_every_example_script_runs(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")
