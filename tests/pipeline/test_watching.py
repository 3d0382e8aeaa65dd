"""The controller watches: after `attach` it never runs the user's code on the user's model."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rig import QUICK, batch
from torch import Tensor, nn
from torch.nn import functional as F

import controlprune as cp

STEPS = 1000
CALLS: Counter[int] = Counter()  # by module; out of reach of attach, which puts back what hangs on a model
CLOCK = Counter({"ns": 0})


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 24), nn.Linear(24, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        CALLS[id(self)] += 1
        CLOCK["ns"] += 1000 + sum(p.numel() for p in self.parameters())
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


MASKED = replace(QUICK, shrink=False)
RUNS: dict[str, dict[str, Any]] = {
    "masked": {"policy": MASKED},
    "shrunk": {"policy": replace(QUICK, looks=0.0)},
    "with looks": {"policy": QUICK},
    "with a learned gate network": {"policy": replace(QUICK, learned=True)},
    "by schedule": {"policy": cp.RigL()},
    "timed": {
        "budget": cp.Budget(latency=0.7),
        "instruments": cp.Instruments(clock=lambda: CLOCK["ns"] * 1e-6),
        "round_to": 1,
    },
    "with totals": {"budget": cp.Budget(flops=0.5, train_flops=0.8)},
    "resumed": {"policy": QUICK},
}


@pytest.mark.parametrize("name", RUNS)
def test_no_forward_but_the_users_own(name: str) -> None:
    torch.manual_seed(0)
    model = Counted()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    options: dict[str, Any] = {
        "budget": cp.Budget(flops=0.5),
        "example_inputs": (torch.zeros(2, 8),),
        "total_steps": STEPS,
        "policy": QUICK,
        **RUNS[name],
    }
    controller = cp.attach(model, optimizer, **options)
    before, others = CALLS[id(model)], sum(CALLS.values())
    shapes = set()
    for step in range(STEPS):
        x, y = batch(step, (8,))
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
        shapes.add(tuple(p.shape for p in model.parameters()))
        if name != "masked" and step == STEPS // 2:
            controller.shrink()  # of a net as small as this it would not pay
        if name == "resumed" and step % 300 == 299:
            controller.load_state_dict(controller.state_dict())
    controller.report()
    small = controller.finalize()
    assert CALLS[id(small)] - before == STEPS
    if name == "timed":
        assert sum(CALLS.values()) - others > STEPS, "it is copies that are timed"
    assert (len(shapes) == 1) == (name == "masked")
    looked = any("look" in row.event for row in controller.history)
    assert looked if name == "with looks" else not (looked and name in ("masked", "shrunk"))


# --- and in its text ------------------------------------------------------------------------------------

ROOT = Path(cp.__file__).parent
RUNNERS = {  # where a module of the user's, or a copy, may be called: attach's trace and check, and timing
    "structure/record.py",
    "structure/formula.py",
    "structure/trial.py",
    "structure/standins.py",  # what a module's own class computes, called by the user's own pass
    "structure/views.py",  # the same
    "cost/energy.py",
    "cost/forward_time.py",
    "cost/replay.py",
    "cost/latency.py",
    "cost/memory.py",
    "cost/survey.py",
    "structure/branches.py",
    "granularity/layers.py",
    "loop/teacher.py",  # a copy, which the user calls
}
OWN = {"app", "ssm", "integrations"}  # the command line's tasks are its own models
MODULES = {"model", "module", "net", "network", "twin", "small", "other", "ddp", "wrapped"}


def calls_of_modules(tree: ast.AST) -> Iterator[str]:
    """Calls of what is named, or annotated, as a module, of `forward`, and of the one function that does."""
    typed = {
        a.arg
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        for a in (*node.args.args, *node.args.kwonlyargs)
        if a.annotation is not None and "Module" in ast.unparse(a.annotation)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
        on = ast.unparse(called.value) if isinstance(called, ast.Attribute) else ""
        if (
            name in {"forward", "__call__", "_call_impl", "call_model", "functional_call"}
            or (isinstance(called, ast.Name) and name in (MODULES | typed))
            or (name in {"model", "module"} and on.startswith(("self", "run", "plant", "controller")))
        ):
            yield ast.unparse(node)


@pytest.mark.parametrize(
    "line", ["m(x)", "self.model(x)", "net(x)", "m.forward(x)", "call_model(m, x)", "run.plant.model(x)"]
)
def test_a_call_of_a_module_is_found_in_a_text(line: str) -> None:
    assert [*calls_of_modules(ast.parse(f"def replay(m: nn.Module, x: Tensor) -> None:\n    {line}"))]


def test_nothing_else_in_the_package_calls_a_module() -> None:
    found = {
        str(path.relative_to(ROOT)): calls
        for path in sorted(ROOT.rglob("*.py"))
        if path.relative_to(ROOT).parts[0] not in OWN
        and (calls := [*calls_of_modules(ast.parse(path.read_text(encoding="utf-8")))])
    }
    assert found.keys() <= RUNNERS, {name: found[name] for name in found.keys() - RUNNERS}
    assert {"structure/record.py", "cost/replay.py"} <= found.keys(), "the search finds those that do"
