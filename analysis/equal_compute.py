"""Closed loop against the best open-loop schedules of the same end point, at equal training FLOPs.

    python analysis/equal_compute.py digits-lenet [--data DIR] [--budget 0.35] [--seeds 5] [--steps 600]

Per seed the controlled run comes first, with everything it computes counted (ablations and probes too). Its
sum of FLOPs is then given to schedules fixed beforehand (schedules.py), which end at the uniform widths of
the same budget; each has one time to choose, its start, and that is solved for the sum::

    one shot        the whole cut at once
    cubic, short    a cubic descent over a quarter of the run
    cubic, long     a cubic descent until three quarters of the run are over

Same initialisation, data and order. `--train` takes only the first so many examples (CIFAR-10 in minutes).
Results are appended to `--results` and resumed from there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from baselines import controlled, dense, structure_of
from measure import Results, bootstrap, paired
from schedules import Cuts, Schedule, cubic, one_shot, training_share
from torch import nn

from controlprune.app.compare import accuracy, count_flops, train
from controlprune.app.report import results_table
from controlprune.app.tasks import Task, load
from controlprune.budget import Budget
from controlprune.structure.groups import Structure

__all__ = ["piece", "solved"]

EVERY = 10  # steps between cuts of the cubic


def solved(make: Callable[[int], Cuts], structure: Structure, share: float, steps: int) -> Cuts:
    """The cuts whose training share is nearest to the one given; it rises with the step that `make` takes."""
    low, high = 1, steps
    while high - low > 1:
        middle = (low + high) // 2
        below = training_share(structure, make(middle), steps) <= share
        low, high = (middle, high) if below else (low, middle)
    return min((make(low), make(high)), key=lambda cuts: abs(training_share(structure, cuts, steps) - share))


def schedules(structure: Structure, budget: float, share: float, steps: int) -> dict[str, Cuts]:
    def short(t: int) -> Cuts:
        return cubic(structure, budget, t, t + steps // 4, EVERY)

    def long(t: int) -> Cuts:
        return cubic(structure, budget, t, max(t + 1, 3 * steps // 4), EVERY)

    makes = {"one shot": lambda t: one_shot(structure, budget, t), "cubic, short": short, "cubic, long": long}
    return {name: solved(make, structure, share, steps) for name, make in makes.items()}


def piece(task: Task, structure: Structure, budget: float, seed: int, steps: int) -> list[dict[str, Any]]:
    """One seed: all sides."""
    whole = count_flops(dense(task, seed).model, task.example(1))
    models: dict[str, tuple[nn.Module, float]] = {}
    side, controller = controlled(task, seed, Budget(flops=budget, train_flops=1.0), steps)
    train([side], steps)
    share = controller.cost()["train_flops"].fraction
    models["closed loop"] = (side.model, share)
    controller.finalize()
    plain = dense(task, seed)
    train([plain], steps)
    models["dense"] = (plain.model, 1.0)
    for name, cuts in schedules(structure, budget, share, steps).items():
        rival = dense(task, seed)
        schedule = Schedule(rival, structure, cuts)
        rival.after = schedule
        train([rival], steps)
        schedule.finish()
        models[name] = (rival.model, training_share(structure, cuts, steps))
    return [
        {
            "side": name,
            "seed": seed,
            "budget": budget,
            "accuracy": 100 * accuracy(model, *task.test),
            "end": count_flops(model, task.example(1)) / whole,
            "training": used,
        }
        for name, (model, used) in models.items()
    ]


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("task")
    options.add_argument("--data", type=Path, default=None)
    options.add_argument("--budget", type=float, default=0.35)
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--steps", type=int, default=None)
    options.add_argument("--train", type=int, default=None)
    options.add_argument("--results", type=Path, default=None)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    task = load(chosen.task, chosen.data)
    if chosen.train is not None:
        task = replace(task, train=(task.train[0][: chosen.train], task.train[1][: chosen.train]))
    steps = chosen.steps or task.steps
    structure = structure_of(task)
    name = f"equal-{chosen.task}-{chosen.budget}-{steps}-{len(task.train[0])}.jsonl"
    results = Results(chosen.results or Path("runs") / name)
    for seed in range(chosen.seeds):
        if not results.has(seed=seed):
            results.append(piece(task, structure, chosen.budget, seed, steps))
    print(summary(results.rows()))
    return 0


def summary(rows: list[dict[str, Any]]) -> str:
    sides = list(dict.fromkeys(row["side"] for row in rows))
    table = []
    for side in sides:
        own = [row for row in rows if row["side"] == side]
        apart = paired(rows, "closed loop", side, lambda row: row["accuracy"], ["seed"])
        table.append(
            {
                "side": side,
                "accuracy": str(bootstrap([row["accuracy"] for row in own])),
                "closed loop minus it": "" if side == "closed loop" else str(apart),
                "end": f"{sum(row['end'] for row in own) / len(own):.3f}",
                "training FLOPs": f"{sum(row['training'] for row in own) / len(own):.3f}",
                "seeds": str(len(own)),
            }
        )
    return results_table(table)


if __name__ == "__main__":
    sys.exit(main())
