"""The job behind `controlprune demo` and `controlprune train`: three trainings, one table, one picture.

Trained side by side on the same batches: the dense network and the controlled one. Then the rival that
matters, the size the controlled one ended with, trained from scratch. All three run for the same number
of steps. Times are process CPU time on one thread; "time/dense" is from turns taken alternately with a
dense run (for the last one, with a second dense run over its first turns).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from torch import nn

from ..budget import Budget
from ..loop.attach import attach
from ..loop.controller import Controller
from ..loop.export import save
from ..policies.feedback.control import Control
from ..structure import analyse
from ..structure.untouched import seeded
from .compare import Side, accuracy, batches, count_flops, count_parameters, fresh, latencies, ratio, train
from .plots import plot
from .report import quantity, results_table
from .tasks import Task

__all__ = ["Progress", "run"]

STAGES = 6  # of a plan that a task brings: as many as the picture shows
PAIRED_STEPS = 120  # of a second dense run, beside the small one, for the ratio of their times


@dataclass
class Progress:
    """One line on the terminal, rewritten in place; elsewhere a line now and then."""

    stream: TextIO
    total: int
    done: int = 0
    began: float = 0.0

    def start(self) -> Progress:
        self.began = time.monotonic()
        return self

    def advance(self, steps: int, note: str) -> None:
        before, self.done = self.done, self.done + steps
        line = f"{100 * self.done // self.total:3d} %  {time.monotonic() - self.began:4.0f} s  {note}"
        if self.stream.isatty():
            self.stream.write(f"\r{line[:100]:<100}" + ("\n" if self.done >= self.total else ""))
        elif 10 * before // self.total != 10 * self.done // self.total:
            self.stream.write(line + "\n")
        self.stream.flush()


def run(task: Task, budget: float, seed: int, out: Path, steps: int | None = None) -> str:
    """Train the three, write picture, record and compact model to `out`; the table as text."""
    steps = task.steps if steps is None else steps
    progress = Progress(sys.stderr, total=3 * steps + min(PAIRED_STEPS, steps)).start()
    with _one_thread():
        dense, controlled, controller = _train_together(task, budget, seed, steps, progress)
        small = controller.finalize()
        widths = controller.history[-1].active
        scratch, beside = _train_from_scratch(task, widths, seed, steps, progress)
        sides = {"dense": dense, "controlled": controlled, "same size from scratch": scratch}
        models = [dense.model, small, scratch.model]
        relative = [1.0, ratio(controlled, dense), ratio(scratch, beside)]
        table = _table(task, list(sides), models, list(sides.values()), relative)
    out.mkdir(parents=True, exist_ok=True)
    plot(controller.history, out / "dynamics.png")
    controller.history.write(out / "history.jsonl")
    save(controller, out / "model.safetensors")
    return table


def _side(model: nn.Module, task: Task, seed: int) -> Side:
    optimizer = torch.optim.Adam(model.parameters(), lr=task.learning_rate)
    return Side(model, optimizer, batches(*task.train, task.batch, seed))


def _dense(task: Task, seed: int) -> nn.Module:
    with seeded(seed):
        return task.factory()


def _train_together(
    task: Task, budget: float, seed: int, steps: int, progress: Progress
) -> tuple[Side, Side, Controller]:
    dense, controlled = (_side(_dense(task, seed), task, seed) for _ in range(2))
    controller = attach(
        controlled.model,
        controlled.optimizer,
        budget=Budget(flops=budget),
        example_inputs=(task.example(8),),
        total_steps=steps,
        policy=None if task.plan is None else Control(plan=task.plan, stages=STAGES),
        seed=seed,
    )
    controlled.after = controller.step

    def show(turn: int, losses: Sequence[float]) -> None:
        share = controller.cost()["flops"].fraction
        progress.advance(
            2 * turn,
            f"dense and controlled: step {dense.steps}/{steps}, loss {losses[0]:.3f} and {losses[1]:.3f},"
            f" FLOPs {100 * share:.0f} %",
        )

    train([dense, controlled], steps, progress=show)
    return dense, controlled, controller


def _train_from_scratch(
    task: Task, widths: Sequence[int], seed: int, steps: int, progress: Progress
) -> tuple[Side, Side]:
    """The small size, and the dense run that took turns with it at first."""
    structure = analyse(_dense(task, seed), (task.example(8),))
    small = _side(fresh(task.factory, structure, widths, seed), task, seed)
    beside = _side(_dense(task, seed), task, seed)

    def show(turn: int, losses: Sequence[float]) -> None:
        note = f"same size from scratch: step {small.steps}/{steps}, loss {losses[0]:.3f}"
        progress.advance(len(losses) * turn, note)

    paired = min(PAIRED_STEPS, steps)
    train([small, beside], paired, progress=show)
    train([small], steps - paired, progress=show)
    return small, beside


def _table(
    task: Task,
    names: Sequence[str],
    models: Sequence[nn.Module],
    sides: Sequence[Side],
    relative: Sequence[float],
) -> str:
    inputs, one = task.example(task.batch), task.example(1)
    dense = count_flops(models[0], one)
    rows = [
        {
            "": name,
            "test accuracy": f"{100 * accuracy(model, *task.test):.2f} %",
            "FLOPs": quantity(count_flops(model, one)),
            "FLOPs/dense": f"{100 * count_flops(model, one) / dense:.1f} %",
            "parameters": quantity(count_parameters(model)),
            "training CPU": f"{side.seconds:.1f} s",
            "time/dense": f"{share:.2f}",
            f"latency, {task.batch} images": f"{1000 * latency:.2f} ms",
        }
        for name, model, side, share, latency in zip(
            names, models, sides, relative, latencies(models, inputs), strict=True
        )
    ]
    return results_table(rows)


@contextmanager
def _one_thread():
    """CPU time is only comparable if no core waits for another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
