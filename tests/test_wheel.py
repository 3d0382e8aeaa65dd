"""What a person installs: wheel and sdist are built, checked, and the wheel prunes a model on its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SMOKE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from torch import nn
import controlprune as cp

assert cp.__file__.startswith(sys.argv[1]), cp.__file__
model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
controller = cp.attach(
    model, optimizer, budget=cp.Budget(flops=0.5), example_inputs=(torch.randn(2, 8),), total_steps=10
)
for _ in range(10):
    loss = model(torch.randn(16, 8)).square().mean()
    loss.backward()
    optimizer.step()
    controller.step(loss)
    optimizer.zero_grad()
small = controller.finalize()
assert small[0].out_features <= 32
"""


def _run(*command: str, cwd: Path) -> str:
    found = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert found.returncode == 0, f"{command}\n{found.stdout}\n{found.stderr}"
    return found.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The sdist, and the wheel made from it, of a copy of the sources."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(
        ROOT / "controlprune", source / "controlprune", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", ".", cwd=source)
    return sorted((source / "dist").iterdir())


def test_its_metadata_is_fit_for_an_index(built: list[Path]) -> None:
    assert [path.suffix for path in built] == [".whl", ".gz"]
    _run(sys.executable, "-m", "twine", "check", "--strict", *map(str, built), cwd=built[0].parent)


def test_it_holds_the_package_and_nothing_else(built: list[Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        names = wheel.namelist()
    assert "controlprune/py.typed" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"controlprune"}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "controlprune").rglob("*.py")}
    assert sources <= set(names)


def test_the_installed_wheel_prunes(built: list[Path], tmp_path: Path) -> None:
    target = tmp_path / "site"
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(target)
    _run(
        sys.executable, "-P" if sys.version_info >= (3, 11) else "-I", "-c", SMOKE, str(target), cwd=tmp_path
    )
