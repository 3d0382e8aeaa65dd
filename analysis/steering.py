"""What the numbers that steer do: each halved and doubled, in loops that they act in.

    python analysis/steering.py [NAME …]            # some five minutes of CPU time

The table of docs/architecture.md says what each rests on. Here a digits MLP trains 400 steps in each of five
loops on a simulated clock, the same for every setting, so that whatever differs is the number's doing:

    flops      0.4 of dense
    total      train_flops 0.5: a sum over the run
    time       train_time 0.7; a fifth of a step's time does not shrink
    latency    0.5 of dense; layers take time in whole tiles of 16
    slows      latency 3 ms, the machine takes 1.4 times as long from half of the run on

Printed, where it differs from the run with the number as it is: use at the end over the limit, largest less
least use in the last two fifths, sets of widths in the run, test accuracy in per cent.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from simulated_clock import Ticker, Timed
from torch import Tensor, nn

import controlprune as cp
from controlprune.app.compare import Side, accuracy, batches, train
from controlprune.app.tasks import Task, load

STEPS = 400
NUMBERS = {
    "allocate.limits": ("NEAR", "FAR", "FINE", "ROUGH"),
    "control.totals": ("DEAD", "SHORT", "HALF"),
    "cost.problem": ("ROOM",),
    "cost.survey": ("FIXED",),
    "loop.ending": ("READINGS", "CORRECTIONS"),
    "policies.feedback.pace": ("OBSERVATION_SHARE", "OBSERVATIONS", "RATE", "CALL", "BANDWIDTH", "SETUP"),
    "policies.feedback.reference": (
        "MOVED", "LITTLE", "HASTE", "MISSED", "SURE", "NEAR", "LEARNED", "NOISE", "UNDER",
    ),
    "saliency.network": ("OPTIMISM", "DOUBT"),
}  # fmt: skip
ALSO = {("allocate.limits", "FAR"): "policies.feedback.reference"}  # where else it is read
BUDGETS = {
    "flops": cp.Budget(flops=0.4),
    "total": cp.Budget(train_flops=0.5),
    "time": cp.Budget(train_time=0.7),
    "latency": cp.Budget(latency=0.5),
    "slows": cp.Budget(latency="3 ms"),
}


@dataclass(frozen=True)
class Outcome:
    end: float  # use over limit
    swing: float  # of the use, fraction of dense
    widths: int
    accuracy: float  # per cent

    def __str__(self) -> str:
        return f"{self.end:.3f} {self.swing:.3f} {self.widths} {self.accuracy:.1f}"


def outcome(loop: str, task: Task) -> Outcome:
    budget, ticker = BUDGETS[loop], Ticker()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(),
        Timed(64, 304, ticker, backward=2),
        nn.ReLU(),
        Timed(304, 104, ticker, backward=2),
        nn.ReLU(),
        Timed(104, 10, ticker, backward=2),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    controller = cp.attach(
        model,
        optimizer,
        budget=budget,
        example_inputs=(task.example(8),),
        total_steps=STEPS,
        round_to=1,
        instruments=cp.Instruments(clock=ticker),
    )
    dense = _seconds(model.eval(), task, ticker)

    def after(loss: Tensor) -> None:
        ticker.seconds += 0.2 * 3 * dense / 0.8  # what of a step does not shrink
        controller.step(loss)

    side = Side(model, optimizer, batches(*task.train, 64, 0), after)
    train([side], STEPS // 2)
    if loop == "slows":
        ticker.slow = 1.4
    train([side], STEPS - STEPS // 2)
    [resource] = budget.targets()
    late = [row.realised[resource] for row in controller.history if row.step > 0.6 * STEPS]
    small = controller.finalize()
    if resource == "latency":
        end = _seconds(small.eval(), task, ticker) / (3e-3 if loop == "slows" else 0.5 * dense)
    else:
        end = controller.cost()[resource].fraction / budget.targets()[resource].value
    layouts = len({row.widths for row in controller.history})
    return Outcome(end, max(late) - min(late), layouts, 100 * accuracy(small, *task.test))


def _seconds(model: nn.Module, task: Task, ticker: Ticker) -> float:
    before = ticker.seconds
    with torch.no_grad():
        model(task.example(8))
    return ticker.seconds - before


@contextmanager
def changed(module: str, name: str, factor: float) -> Iterator[None]:
    """The number times the factor, wherever it is read."""
    read = {module, ALSO.get((module, name), module)}
    places = [importlib.import_module(f"controlprune.{place}") for place in read]
    value = getattr(places[0], name)
    other = value * factor
    for place in places:
        setattr(place, name, max(1, round(other)) if isinstance(value, int) else other)
    try:
        yield
    finally:
        for place in places:
            setattr(place, name, value)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("names", nargs="*", help="numbers; all where none is given")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    task = load("digits-mlp")
    usual = {loop: outcome(loop, task) for loop in BUDGETS}
    for loop, found in usual.items():
        print(f"as it is, {loop}: {found}", flush=True)
    for module, names in NUMBERS.items():
        for name in names:
            if chosen.names and name not in chosen.names:
                continue
            said = []
            for factor in (0.5, 2.0):
                with changed(module, name, factor):
                    found = {loop: outcome(loop, task) for loop in BUDGETS}
                said += [f"× {factor:g} {k}: {found[k]}" for k in BUDGETS if found[k] != usual[k]]
            print(f"{module} {name}: {'; '.join(said) or 'the same'}", flush=True)


if __name__ == "__main__":
    main()
