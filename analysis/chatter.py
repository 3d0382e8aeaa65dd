"""What the devices against chatter do: accuracy, exchanges and layouts with and without each.

    python analysis/chatter.py [--data DIR] [--seeds 6]

As the default is, nothing comes back in runs this short, so the controller is made restless: its masks are
revised at every update (`revise_every=1, looks=1`). Digits: an MLP 256-128 to 0.25 of the FLOPs, 700 steps.
With `--data`, CIFAR-10: a CNN 16-32-48-48 on 12,000 images to 0.3, 600 steps, a third of the seeds. Batches
of 64, Adam. Printed: test accuracy, per cent, of each seed and in the mean; units switched after 0.31 of the
run, and sets of widths. About two minutes of CPU time for the digits.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import controlprune as cp
from controlprune.app.compare import Side, accuracy, batches, train
from controlprune.app.report import table
from controlprune.app.tasks import Task, load, mlp, plain_net

RESTLESS = cp.Control(revise_every=1, looks=1.0)
CASES = {
    "restless": RESTLESS,
    "without `freeze`": replace(RESTLESS, freeze=1.0),
    "without `hysteresis`": replace(RESTLESS, hysteresis=0.0),
    "without both": replace(RESTLESS, freeze=1.0, hysteresis=0.0),
    "as it is by default": cp.Control(),
}
SETTLED = 0.31  # of the run: the plan is over


@dataclass(frozen=True)
class Outcome:
    accuracy: float  # per cent
    switched: int  # units, after the plan
    widths: int  # sets of them in the run


def outcome(task: Task, budget: float, control: cp.Control, seed: int) -> Outcome:
    torch.manual_seed(seed)
    model = task.factory()
    optimizer = torch.optim.Adam(model.parameters(), lr=task.learning_rate)
    controller = cp.attach(
        model,
        optimizer,
        budget=cp.Budget(flops=budget),
        example_inputs=(task.example(),),
        total_steps=task.steps,
        policy=control,
        seed=seed,
    )
    side = Side(model, optimizer, batches(*task.train, task.batch, seed), controller.step)
    train([side], task.steps)
    rows = list(controller.history)
    late = [row for row in rows if row.step > SETTLED * task.steps]
    small = controller.finalize()
    return Outcome(
        accuracy=100 * accuracy(small, *task.test),
        switched=sum(sum(row.on) + sum(row.off) for row in late),
        widths=len({row.active for row in rows}),
    )


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", type=Path, default=None, help="folder that holds cifar10/")
    options.add_argument("--seeds", type=int, default=6)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    digits = replace(load("digits-mlp"), factory=partial(mlp, 64, (256, 128)), steps=700)
    tasks = [("digits", digits, 0.25, chosen.seeds)]
    if chosen.data is not None:
        cifar = load("cifar10", chosen.data)
        few = (cifar.train[0][:12_000], cifar.train[1][:12_000])
        net = partial(plain_net, 3, (16, 32, 48, 48))
        small = replace(cifar, train=few, factory=net, steps=600, batch=64)
        tasks.append(("cifar10", small, 0.3, max(1, chosen.seeds // 3)))
    for name, task, budget, seeds in tasks:
        print(f"{name}, {seeds} seeds")
        rows = []
        for case, control in CASES.items():
            found = [outcome(task, budget, control, seed) for seed in range(seeds)]
            means = [float(np.mean([getattr(one, field) for one in found])) for field in vars(found[0])]
            each = " ".join(f"{one.accuracy:.2f}" for one in found)
            rows.append([case, f"{means[0]:.2f}", f"{means[1]:.0f}", f"{means[2]:.1f}", each])
        print(table(["", "accuracy", "switched", "widths", "seeds"], rows), flush=True)


if __name__ == "__main__":
    main()
