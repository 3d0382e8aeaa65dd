"""Rotation: accuracy, CPU time and FLOPs of training against the share of units that is active at a time.

    python -m analysis.rotation run --data DIR                         what is not in the results yet
    python -m analysis.rotation tables --into docs/results.md --figure docs/rotation.png

One training is one line of `analysis/results/rotation.jsonl`. Beside every active share, on the same batches:

    rotation       that share of every group at a time, turned over for nine tenths of the run, then dense
    small net      the same widths, the units of the first step all through; small at the end
    dense, cut     the dense net for as many steps as fit into the CPU time that rotation took
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

import controlprune as cp

from .bench.run import measured
from .bench.sides.ours import Ours
from .bench.sides.side import Run, Side
from .bench.tables import placed
from .bench.task import Task
from .bench.tasks.language import language
from .measure import Results, bootstrap
from .weights import cifar, mnist

__all__ = ["SHARES", "TASKS", "Rotated", "main", "tables"]

RESULTS = Path(__file__).parent / "results" / "rotation.jsonl"
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
RECALIBRATED = 20  # batches, for the statistics of norms
UNTIL = 0.9  # of the run it rotates, then all units train together

TASKS: dict[str, Callable[[Path], Task]] = {
    "mnist": mnist,
    "cifar": cifar,
    "language": lambda data: replace(language(data, steps=150), glance=None),
}


class Rotated(Ours):
    """`run.budget` is the active share; `turns=False`: the small net."""

    def __init__(self, *, turns: bool = True) -> None:
        super().__init__()
        self.turns = turns

    def begin(self, run: Run) -> None:
        Side.begin(self, run)
        never = None if self.turns else 10**9
        final = "dense" if self.turns else "small"
        self.controller = cp.attach(
            run.model,
            run.optimizer,
            budget=cp.Budget(flops=1.0),
            example_inputs=run.example,
            total_steps=run.steps,
            seed=run.seed,
            policy=cp.Rotation(active=run.budget, period=never, final=final, until=UNTIL),
        )
        self._share, self._held, self._work = 1.0, None, self.controller.plant.structure.work

    def finish(self) -> nn.Module:
        model = super().finish()
        if self.turns and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
            _recalibrate(model, self.run)
        return model


@torch.no_grad()
def _recalibrate(model: nn.Module, run: Run) -> None:
    """Running statistics of the dense net, from a few batches; on the clock."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None
    batches = run.task.batches(run.seed)
    for _ in range(RECALIBRATED):
        run.task.outputs(model, next(batches))


def main(arguments: Sequence[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("command", choices=("run", "tables"))
    parser.add_argument("--data", type=Path, help="the folder with mnist/, cifar10/ and tinyshakespeare/")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=math.inf, help="after that none is begun")
    parser.add_argument("--into", type=Path, metavar="PAGE.md")
    parser.add_argument("--figure", type=Path, metavar="PICTURE.png")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    results = Results(options.results)
    if options.command == "run":
        torch.set_num_threads(1)
        tasks, until = (
            [TASKS[t](options.data) for t in options.tasks],
            time.monotonic() + 60 * options.minutes,
        )
        for seed, task in product(options.seeds, tasks):
            for side, steps, share in _pieces(task, options.shares, seed, results):
                if time.monotonic() > until:
                    return 0
                _train(replace(task, steps=steps), side, share, seed, results)
        return 0
    rows = results.rows()
    if options.figure is not None:
        _draw(rows, options.figure)
    if options.into is None:
        print(tables(rows))
    else:
        page = options.into.read_text(encoding="utf-8")
        options.into.write_text(placed(page, {"rotation": tables(rows)}), encoding="utf-8")
    return 0


def _pieces(
    task: Task, shares: Sequence[float], seed: int, results: Results
) -> Iterator[tuple[str, int, float]]:
    """Those that are left; how long "dense, cut" may take is known when the two others are there."""
    key = {"task": task.name, "seed": seed}
    if not results.has(side="dense", **key):
        yield "dense", task.steps, 1.0
    for share in shares:
        for side in ("rotation", "small net"):
            if not results.has(side=side, budget=share, **key):
                yield side, task.steps, share
        if not results.has(side="dense, cut", budget=share, **key):
            ours, dense = (_of(results.rows(), side=s, **key) for s in ("rotation", "dense"))
            ours = _of(ours, budget=share)
            if ours and dense:
                yield "dense, cut", max(1, round(task.steps * min(1.0, _time(ours) / _time(dense)))), share


def _train(task: Task, side: str, share: float, seed: int, results: Results) -> None:
    made = {"rotation": Rotated, "small net": partial(Rotated, turns=False)}.get(side, Side)()
    row = measured(task, made, side, share, seed, lambda *_: None)
    results.append([row])
    said = f"{row[task.figure]:.3f}, {row['seconds']:.0f} s CPU"
    print(
        f"{task.name}, {side} at {share}, seed {seed}, {task.steps} steps: {said}",
        file=sys.stderr,
        flush=True,
    )


# --- tables and figure --------------------------------------------------------------------------------------


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """One table a task: what an active share costs, and what comes of it."""
    return "\n\n".join(_table(_of(rows, task=t)) for t in _ran(rows))


def _table(rows: Sequence[dict[str, Any]]) -> str:
    dense, figure = _of(rows, side="dense"), _figure(rows)
    head = f"**{rows[0]['task']}, {dense[0]['steps']} steps, {figure} of dense {_shown(dense)}**"
    columns = ["active", "rotation", "small net", "dense, cut", "training FLOPs", "time/dense", "small net's"]
    lines = [head, "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for share in sorted({r["budget"] for r in rows if r["side"] == "rotation"}):
        ours, small, cut = (_of(rows, side=s, budget=share) for s in ("rotation", "small net", "dense, cut"))
        times = [f"{_time(found) / _time(dense):.2f}" if found else "" for found in (ours, small)]
        flops = f"{mean(r['train_flops'] for r in ours):.3f}"
        lines.append(
            "| " + " | ".join([f"{share:g}", *map(_shown, (ours, small, cut)), flops, *times]) + " |"
        )
    return "\n".join(lines)


def _draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Left to right the tasks: the figure against the CPU time of the training."""
    import matplotlib.pyplot as plt

    names = _ran(rows)
    picture, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.4), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        own = _of(rows, task=name)
        dense, figure = _of(own, side="dense"), _figure(own)
        axis.plot(1.0, mean(r[figure] for r in dense), "k*", markersize=11, label="dense")
        for side, style in (("rotation", "o-"), ("small net", "s--"), ("dense, cut", "^:")):
            cells = [_of(own, side=side, budget=share) for share in SHARES]
            points = [(_time(c) / _time(dense), mean(r[figure] for r in c)) for c in cells if c]
            axis.plot(*zip(*sorted(points), strict=True), style, label=side)
        axis.set(title=name, xlabel="CPU time of the training, of dense", ylabel=figure)
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    picture.tight_layout()
    picture.savefig(path, dpi=110)


def _of(rows: Sequence[dict[str, Any]], **key: Any) -> list[dict[str, Any]]:
    return [row for row in rows if all(row[name] == value for name, value in key.items())]


def _ran(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The tasks on which there is something to compare."""
    return [task for task in TASKS if all(_of(rows, task=task, side=s) for s in ("dense", "rotation"))]


def _figure(rows: Sequence[dict[str, Any]]) -> str:
    return "accuracy" if "accuracy" in rows[0] else "loss"


def _shown(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    found, form = bootstrap([r[_figure(rows)] for r in rows]), ".2f" if "accuracy" in rows[0] else ".3f"
    between = f" [{found.low:{form}}, {found.high:{form}}]" if len(rows) > 1 else ""
    return f"{found.mean:{form}}{between} ({len(rows)})"


def _time(rows: Sequence[dict[str, Any]]) -> float:
    return mean(row["seconds"] / row["kernel"] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
