"""One training: task, side, budget, seed -> one row of results. The loop is the same for all sides."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import controlprune as cp

from .clock import Clock
from .sides import Run, Side
from .task import Task

__all__ = ["measured", "provenance"]

Progress = Callable[[int, float], None]
COMPARED = 20  # times that the machine is measured in a run
GLANCES = 12  # times that the figure is looked at on the way


def measured(
    task: Task,
    side: Side,
    name: str,
    budget: float,
    seed: int,
    progress: Progress,
    found: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Train, and everything a table wants to know of it. `found`: the widths that ours ended with."""
    model = task.dense(seed)
    run = Run(task, budget, seed, model, task.optimizer(model), Clock(), found)
    model = _train(run, side, progress)
    model.eval()
    return {
        "task": task.name,
        "side": name,
        "budget": budget,
        "seed": seed,
        "steps": task.steps,
        **task.evaluate(model),
        "flops": side.share,
        "train_flops": sum(run.shares) / len(run.shares),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": run.clock.seconds,
        "kernel": run.clock.kernel,
        "latency": _latency(model, task),
        "curve": run.curve,
        **run.notes,
        **provenance(),
    }


def _train(run: Run, side: Side, progress: Progress) -> nn.Module:
    task, clock = run.task, run.clock
    torch.manual_seed(run.seed)
    clock.start()
    side.begin(run)
    rates = [group["lr"] for group in run.optimizer.param_groups]
    run.model.train()
    batches = task.batches(run.seed)
    for step in range(task.steps):
        if step % max(1, task.steps // COMPARED) == 0:
            clock.compare()
        factor = task.rate((step + 0.5) / task.steps)
        for group, rate in zip(run.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        run.shares.append(side.step_share)
        loss = side.loss(run.model, next(batches), step)
        loss.backward()
        side.observe(step)
        run.optimizer.step()
        side.after(step + 1, loss)
        run.optimizer.zero_grad()
        with clock.paused():
            _glance(run, step + 1)
            progress(step + 1, side.share)
    model = side.finish()
    clock.stop()
    return model


def _glance(run: Run, step: int) -> None:
    """The figure on the way, on a part of what is held out; off the clock."""
    if run.task.glance is None or step * GLANCES // run.steps == (step - 1) * GLANCES // run.steps:
        return
    run.model.eval()
    run.curve.append((step, round(run.task.glance(run.model), 4)))
    run.model.train()


def _latency(model: nn.Module, task: Task, repeats: int = 30) -> float:
    """Median CPU seconds of a forward pass of 8 rows."""
    example, times = task.example(8), []
    with torch.no_grad():
        for _ in range(repeats):
            began = time.process_time()
            _ = model(**example) if isinstance(example, dict) else model(*example)
            times.append(time.process_time() - began)
    return median(times)


def provenance() -> dict[str, Any]:
    """What a figure has to be quoted with."""
    return {
        "commit": _commit(),
        "torch": torch.__version__,
        "controlprune": version_of("controlprune"),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "when": time.strftime("%Y-%m-%d %H:%M"),
    }


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "?"


def _commit() -> str:
    """Of the package that was measured; with a plus where it has changes that are not committed."""
    folder = Path(cp.__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False
        ).stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "?") + ("+" if git("status", "--porcelain", ".") else "")
