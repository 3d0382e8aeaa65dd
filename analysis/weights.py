"""Single weights off, by every policy: accuracy at 80, 90 and 95 % of the weights, on an MLP and a CNN.

    python -m analysis.weights run --data DIR                   what is not in the results yet
    python -m analysis.weights tables --into docs/results.md    between the page's marks

One training is one line of `analysis/results/weights.jsonl`; a run can be stopped at any time and goes on.
Tasks and loop are the bench's (`bench/task.py`, `bench/run.py`), so is the optimizer, Adam: its step is the
same share of a weight at any density. (Under SGD a random sparse net with norms begins with small weights,
hence at a higher effective rate.) The budget is of parameters: a share of the weights, all biases and norms.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

import controlprune as cp
from controlprune.app.compare import accuracy
from controlprune.app.tasks import load, mlp
from controlprune.structure.extents import size

from .bench.run import measured
from .bench.sides.side import Run, Side
from .bench.tables import placed
from .bench.task import Task, cosine
from .bench.tasks.images import scratch
from .measure import Results, bootstrap

__all__ = ["POLICIES", "TASKS", "Weights", "main", "tables"]

RESULTS = Path(__file__).parent / "results" / "weights.jsonl"
DENSITIES = (0.2, 0.1, 0.05)
Policy = Callable[[], cp.Policy]

POLICIES: dict[str, Policy] = {
    "static, random": partial(cp.Static, layers="erk"),
    "static, SNIP": partial(cp.Static, by="snip", batches=4, layers="erk"),
    "gradual": partial(cp.Gradual, layers="erk"),
    "SET": partial(cp.SET, until=0.75, layers="erk"),
    "RigL": partial(cp.RigL, until=0.75, layers="erk"),
    "controller, from dense": cp.Control,
    "controller, from the budget": partial(cp.Control, start="budget"),
}


class Weights(Side):
    """The policy at `run.budget` of the weights."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def begin(self, run: Run) -> None:
        super().begin(run)
        self.controller = cp.attach(
            run.model,
            run.optimizer,
            budget=cp.Budget(params=str(live(run.model, run.budget))),
            example_inputs=run.example,
            total_steps=run.steps,
            seed=run.seed,
            granularity="weight",
            policy=self.policy(),
        )
        self._record, self._share = -1, 1.0

    def after(self, step: int, loss: Tensor) -> None:
        self.controller.step(loss)

    @property
    def share(self) -> float:
        """FLOPs as they are counted: two for each live weight and use."""
        history = self.controller.history
        if len(history) - 1 != self._record:
            self._record = len(history) - 1
            structure = self.controller.plant.structure
            used = _flops(structure.work, history[-1].active)
            self._share = used / _flops(structure.work, structure.sizes)
        return self._share

    def finish(self) -> nn.Module:
        sparse, sizes = self.controller.finalize(), self.controller.plant.structure.sizes
        history = self.controller.history
        on = history[-1].active
        self.run.notes |= {
            "overhead": self.controller.overhead_seconds,
            "density": sum(on) / sum(sizes),
            "densities": [round(n / whole, 4) for n, whole in zip(on, sizes, strict=True)],
            "updates": len(history),
            "exchanged": sum(sum(record.on) for record in history),
        }
        return sparse


def _flops(work: Sequence[Any], widths: Sequence[int]) -> float:
    return sum(w.coefficient * math.prod(size(f, widths) for f in w.factors) for w in work)


def live(model: nn.Module, density: float) -> int:
    """Parameters with that share of the weights on."""
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    return int(density * weights) + sum(p.numel() for p in model.parameters() if p.ndim < 2)


# --- what is trained ------------------------------------------------------------------------------------


def mnist(data: Path, steps: int = 600, batch: int = 128) -> Task:
    """784-300-100-10."""

    @cache
    def loaded() -> Any:
        return load("mnist", data)

    def net(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return mlp(784, (300, 100))

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = loaded().train
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(x), generator=generator)
            yield from ((x[rows], y[rows]) for rows in order[: len(x) - len(x) % batch].split(batch))

    return Task(
        name="mnist",
        steps=steps,
        budgets=DENSITIES,
        dense=net,
        blank=net,
        optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=2e-3),
        batches=batches,
        outputs=lambda model, pair: (model(pair[0]), pair[1]),
        evaluate=lambda model: {"accuracy": 100 * accuracy(model, *loaded().test)},
        example=lambda rows: (loaded().example(rows),),
        rate=cosine(),
    )


def cifar(data: Path, steps: int = 500, batch: int = 32) -> Task:
    """The bench's CNN at half its widths, 16-32-64-64, on CIFAR-10 at 16×16."""
    task = scratch(data, steps, batch, widths=(16, 32, 64, 64))
    return replace(task, name="cifar", budgets=DENSITIES, glance=None)


TASKS: dict[str, Callable[[Path], Task]] = {"mnist": mnist, "cifar": cifar}


# --- runs and tables ------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "tables"))
    parser.add_argument("--data", type=Path, help="the folder with mnist/ and cifar10/")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--sides", nargs="+", default=list(POLICIES), choices=list(POLICIES), metavar="SIDE")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=math.inf, help="after that none is begun")
    parser.add_argument("--into", type=Path, metavar="PAGE.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    results = Results(options.results)
    if options.command == "run":
        torch.set_num_threads(1)
        made = [TASKS[name](options.data) for name in options.tasks]
        _run(made, options.sides, options.seeds, results, time.monotonic() + 60 * options.minutes)
    elif options.into is None:
        print(tables(results.rows()))
    else:
        page = options.into.read_text(encoding="utf-8")
        options.into.write_text(placed(page, {"weights": tables(results.rows())}), encoding="utf-8")
    return 0


def _run(
    tasks: Sequence[Task], sides: Sequence[str], seeds: Sequence[int], results: Results, until: float
) -> None:
    pieces = [(seed, task, "dense", 1.0) for seed, task in product(seeds, tasks)]
    pieces += [
        (seed, task, side, density)
        for seed, task in product(seeds, tasks)
        for density, side in product(task.budgets, sides)
    ]
    for seed, task, side, density in sorted(pieces, key=lambda piece: piece[0]):
        key = {"task": task.name, "side": side, "budget": density, "seed": seed, "steps": task.steps}
        if results.has(**key) or time.monotonic() > until:
            continue
        made = Side() if side == "dense" else Weights(POLICIES[side])
        row = measured(task, made, side, density, seed, lambda *_: None)
        results.append([row])
        print(f"{key}: {row['accuracy']:.2f}, {row['seconds']:.0f} s CPU", file=sys.stderr, flush=True)


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """One table a task: the sides, and the densities side by side."""
    return "\n\n".join(_table([r for r in rows if r["task"] == t]) for t in TASKS if _of(rows, task=t))


def _of(rows: Sequence[dict[str, Any]], **key: Any) -> list[dict[str, Any]]:
    return [row for row in rows if all(row[name] == value for name, value in key.items())]


def _table(rows: Sequence[dict[str, Any]]) -> str:
    dense = _of(rows, side="dense")
    densities = sorted({r["budget"] for r in rows if r["side"] != "dense"}, reverse=True)
    head = f"**{rows[0]['task']}, {rows[0]['steps']} steps, dense {_interval(dense)}**"
    columns = ["policy", *(f"{100 * (1 - d):.0f} % off" for d in densities), "FLOPs counted", "time/dense"]
    lines = [head, "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for side in POLICIES:
        cells = [_of(rows, side=side, budget=d) for d in densities]
        mine = [row for cell in cells for row in cell]
        if mine:
            flops = ", ".join(f"{mean(r['flops'] for r in cell):.3f}" for cell in cells if cell)
            shown = [side, *map(_interval, cells), flops, f"{_time(mine) / _time(dense):.2f}"]
            lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _interval(rows: Sequence[dict[str, Any]]) -> str:
    """With the number of seeds in brackets."""
    if len(rows) < 2:
        return f"{rows[0]['accuracy']:.2f} (1)" if rows else ""
    return f"{bootstrap([row['accuracy'] for row in rows])} ({len(rows)})"


def _time(rows: Sequence[dict[str, Any]]) -> float:
    return mean(row["seconds"] / row["kernel"] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
