"""Accuracy and training time of the controlled network beside its rivals, on MNIST or CIFAR-10.

    python analysis/accuracy.py mnist --data ../shared/data --budgets 0.2 0.5 --seeds 10
    python analysis/accuracy.py mnist --only-summary

A piece is one (task, budget, seed): all sides take turns on the same batches, then the controlled one's
size is trained from scratch. Finished pieces are in the results file and are not run again. What a study
will cost is measured on a few steps and said before it starts. Accuracy in per cent, differences paired by
seed; time is process CPU time relative to a dense run that took turns with it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from baselines import after, controlled, dense, from_scratch, static, structure_of, uniform_widths
from measure import Results, bootstrap, machine, paired

from controlprune.app.compare import Side, accuracy, count_flops, count_parameters, ratio, train
from controlprune.app.report import results_table
from controlprune.app.tasks import TASKS, Task, load
from controlprune.policies.feedback.control import Control
from controlprune.structure.groups import Structure

PAIRED_STEPS = 200  # of a second dense run beside "same from scratch"
BY = ("budget", "seed")


def main() -> int:
    options = _options()
    results = Results(options.out if options.out else Path(f"runs/accuracy-{options.task}.jsonl"))
    if not options.only_summary:
        torch.set_num_threads(1)
        task = load(options.task, options.data)
        steps = options.steps or task.steps
        _study(task, options.budgets, range(options.seeds), steps, results)
    print(summary([row for row in results.rows() if row["task"] == options.task]))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--data", type=Path, help="folder with mnist/ and cifar10/ (default: the hub)")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="default: what suits the task")
    parser.add_argument("--out", type=Path, help="default: runs/accuracy-TASK.jsonl")
    parser.add_argument("--only-summary", action="store_true")
    return parser.parse_args()


def _study(task: Task, budgets: Sequence[float], seeds: Sequence[int], steps: int, results: Results) -> None:
    pieces = [(budget, seed) for seed in seeds for budget in budgets]
    left = [p for p in pieces if not results.has(task=task.name, budget=p[0], seed=p[1], steps=steps)]
    structure = structure_of(task)
    runs = 6 + min(PAIRED_STEPS, steps) / steps  # all sides, at most as long as dense, and the second dense
    hours = len(left) * _seconds_of_dense(task, steps) * runs / 3600
    print(f"{len(left)} of {len(pieces)} pieces left, at most about {hours:.2f} core-hours", file=sys.stderr)
    for budget, seed in left:
        began = time.process_time()
        results.append(piece(task, structure, budget, seed, steps))
        print(
            f"budget {budget}, seed {seed}: {time.process_time() - began:.0f} s CPU",
            file=sys.stderr,
            flush=True,
        )


def _seconds_of_dense(task: Task, steps: int, sample: int = 10) -> float:
    side = dense(task, 0)
    train([side], 2 * sample, chunk=sample)
    return side.chunks[-1] / sample * steps


def piece(task: Task, structure: Structure, budget: float, seed: int, steps: int) -> list[dict[str, Any]]:
    """All sides of one budget and seed; one row each."""
    widths = uniform_widths(structure, budget)
    control, controller = controlled(task, seed, budget, steps)
    small, mover = controlled(task, seed, budget, steps, Control(start="budget"))
    sides = {
        "dense": dense(task, seed),
        "controlled": control,
        "controlled, started small": small,
        "uniform from scratch": from_scratch(task, seed, structure, widths),
        "static": static(task, seed, structure, widths),
        "after": after(task, seed, structure, widths, steps),
    }
    train(list(sides.values()), steps)
    controller.finalize()
    mover.finalize()
    relative = {name: ratio(side, sides["dense"]) for name, side in sides.items()}
    same = from_scratch(task, seed, structure, controller.history[-1].active)
    beside, together = dense(task, seed), min(PAIRED_STEPS, steps)
    train([same, beside], together)
    train([same], steps - together)
    sides["same from scratch"], relative["same from scratch"] = same, ratio(same, beside)
    common = {"task": task.name, "budget": budget, "seed": seed, "steps": steps, **machine()}
    last, moved = controller.history[-1].active, mover.history[-1].active
    ends = {"controlled": last, "controlled, started small": moved, "same from scratch": last}
    return [
        {**common, "side": name, **_measured(task, side, sides["dense"]), "time": relative[name],
         "widths": ends.get(name, structure.sizes if name == "dense" else widths)}
        for name, side in sides.items()
    ]  # fmt: skip


def _measured(task: Task, side: Side, beside: Side) -> dict[str, Any]:
    one = task.example(1)
    return {
        "accuracy": 100 * accuracy(side.model, *task.test),
        "flops": count_flops(side.model, one) / count_flops(beside.model, one),
        "parameters": count_parameters(side.model),
        "seconds": side.seconds,
    }


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """One table per budget and number of steps: means and 95 % bootstrap intervals over seeds."""
    tables = []
    for budget, steps in sorted({(row["budget"], row["steps"]) for row in rows}):
        mine = [row for row in rows if (row["budget"], row["steps"]) == (budget, steps)]
        names = list(dict.fromkeys(row["side"] for row in mine))
        lines = [_line(mine, name) for name in names]
        tables.append(f"FLOPs budget {budget}, {steps} steps\n{results_table(lines)}")
    return "\n\n".join(tables) if tables else "no results yet"


def _line(rows: Sequence[dict[str, Any]], name: str) -> dict[str, str]:
    own = [row for row in rows if row["side"] == name]

    def difference(other: str) -> str:
        return "–" if name == other else str(paired(rows, name, other, lambda row: row["accuracy"], BY))

    return {
        "side": name,
        "seeds": str(len(own)),
        "accuracy": str(bootstrap([row["accuracy"] for row in own])),
        "minus dense": difference("dense"),
        "minus same from scratch": difference("same from scratch"),
        "FLOPs": f"{bootstrap([row['flops'] for row in own]).mean:.3f}",
        "time/dense": str(bootstrap([row["time"] for row in own])),
    }


if __name__ == "__main__":
    sys.exit(main())
