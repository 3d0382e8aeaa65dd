"""Dependencies go one way: no import cycles, and each outside world is met in one place only."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import controlprune

ROOT = Path(controlprune.__file__).parent


def module_name(path: Path) -> str:
    """Dotted, below the package; the package itself is ""."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(name: str, everywhere: bool) -> Iterator[str]:
    """Absolute dotted names that a module imports: at its top, or anywhere in it."""
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = ["controlprune", *package.split(".")] if package else ["controlprune"]
            base = here[: len(here) - node.level + 1] if node.level else []
            parent = ".".join([*base, *([node.module] if node.module else [])])
            yield parent
            yield from (f"{parent}.{alias.name}" for alias in node.names)


def inside(name: str, everywhere: bool = False) -> set[str]:
    """Modules of this package that a module imports; `from .package import name` counts as the package."""
    found = {
        i.removeprefix("controlprune").lstrip(".")
        for i in imports(name, everywhere)
        if i.startswith("controlprune")
    }
    return (found & FILES.keys()) - {name, ""}


def test_imports_go_downward_only() -> None:
    """The layers are written down in pyproject.toml."""
    found = subprocess.run(["lint-imports"], cwd=ROOT.parent, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


def test_there_are_no_import_cycles() -> None:
    """Not even of imports inside functions, or for types only."""
    graph = {name: inside(name, everywhere=True) for name in FILES if name}
    graph = {
        name: {other for other in deps if not name.startswith(f"{other}.")} for name, deps in graph.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, naming the cycle


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("torch.distributed", {"loop.replicas", "plant.shards", "plant.fsdp"}),
        ("torch.distributed.fsdp", {"plant.fsdp"}),
        ("torch.nn.parallel", {"loop.replicas"}),
        ("matplotlib", {"app.plots", "app.hankel_plot"}),
        ("sklearn", {"app.tasks"}),
        ("datasets", {"app.tasks"}),
        ("safetensors", {"loop.export", "integrations.hub"}),
    ],
)
def test_each_outside_world_is_met_in_one_place(package: str, allowed: set[str]) -> None:
    users = {
        name
        for name in FILES
        for used in imports(name, everywhere=True)
        if f"{used}.".startswith(f"{package}.")
    }
    assert users <= allowed


def test_files_and_classes_are_small() -> None:
    """At most 400 lines a file, 30 methods a class: every `def` of its body, properties and setters each."""
    long = [name for name, path in FILES.items() if len(path.read_text(encoding="utf-8").splitlines()) > 400]
    assert not long
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                methods = [one for one in node.body if isinstance(one, ast.FunctionDef)]
                assert len(methods) <= 30, f"{name}: {node.name}"


@pytest.mark.parametrize("package", ["sklearn", "datasets", "PIL", "transformers", "torch_geometric"])
def test_optional_packages_are_imported_only_where_used(package: str) -> None:
    assert not [
        n
        for n in FILES
        if not n.startswith("integrations.")  # each is one library's, and imported by nobody inside
        for used in imports(n, everywhere=False)
        if f"{used}.".startswith(f"{package}.")
    ]
