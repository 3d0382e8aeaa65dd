"""Depth against width at one latency: a small residual net on CIFAR-10, cut by channels, branches or both.

    python -m analysis.depth run --data DIR                   what is not in the results yet
    python -m analysis.depth tables --into docs/results.md    between the page's marks

The net: stem 16, three blocks at 16×16 of width 16, a convolution to 32, three blocks at 8×8; every block is
x + B(x) with two 3×3 convolutions. The budget is `latency`, half of dense, at 64 rows, on a clock of process
CPU time, as other work runs here; what is reached is measured again at the end, in turn with a dense copy.
One training is one line of `analysis/results/depth.jsonl`; loop and optimizer are the bench's.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

import controlprune as cp
from controlprune.cost.clock import measure_interleaved

from .bench.run import measured
from .bench.sides.side import Run, Side
from .bench.tables import placed
from .bench.task import Task
from .bench.tasks.images import scratch
from .measure import Results, bootstrap

__all__ = ["SIDES", "Cut", "main", "resnet", "tables"]

RESULTS = Path(__file__).parent / "results" / "depth.jsonl"
LATENCY, ROWS = 0.5, 64
SIDES = {"width": "channel", "depth": "layer", "both": "channel+layer"}


class Block(nn.Module):
    """x + B(x), nothing after the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.first = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.two, self.second = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.two(torch.relu(self.first(self.one(x)))))


def resnet(seed: int, widths: tuple[int, int] = (16, 32), blocks: int = 3, channels: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, width in zip((channels, widths[0]), widths, strict=True):
        layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [*(Block(width) for _ in range(blocks)), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[1], 10))


class Cut(Side):
    """`cp.attach` with a latency budget, by one granularity."""

    def __init__(self, granularity: str) -> None:
        self.granularity = granularity

    def begin(self, run: Run) -> None:
        super().begin(run)
        self.dense = copy.deepcopy(run.model).eval()
        self.controller = cp.attach(
            run.model,
            run.optimizer,
            budget=cp.Budget(latency=run.budget),
            example_inputs=run.task.example(ROWS),
            total_steps=run.steps,
            seed=run.seed,
            granularity=self.granularity,
            instruments=cp.Instruments(clock=time.process_time),
        )

    def after(self, step: int, loss: Tensor) -> None:
        self.controller.step(loss)

    @property
    def share(self) -> float:
        return self.controller.history[-1].realised["latency"] if len(self.controller.history) else 1.0

    def finish(self) -> nn.Module:
        small = self.controller.finalize()
        masks = self.controller.masks
        layers = [bool(mask.any()) for name, mask in masks.items() if name.startswith("layer")]
        whole = sum(isinstance(module, Block) for module in self.dense.modules())
        self.run.notes |= {
            "branches": sum(layers) if layers else whole,
            "channels": [int(mask.sum()) for name, mask in masks.items() if not name.startswith("layer")],
            "reached": _over_dense(small, self.dense, self.run.task.example(ROWS)),
        }
        return small


def _over_dense(small: nn.Module, dense: nn.Module, example: tuple[Tensor, ...]) -> float:
    twin = copy.deepcopy(small).eval()
    with torch.no_grad():
        ours, theirs = measure_interleaved(
            [lambda: twin(*example), lambda: dense(*example)], clock=time.process_time, seconds=2.0
        )
    return ours.median / theirs.median


def task(data: Path, steps: int = 400, batch: int = 32) -> Task:
    found = scratch(data, steps, batch)
    return replace(found, name="depth", budgets=(LATENCY,), dense=resnet, blank=resnet, glance=None)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "tables"))
    parser.add_argument("--data", type=Path, help="the folder with cifar10/")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--into", type=Path, metavar="PAGE.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    results = Results(options.results)
    if options.command == "run":
        torch.set_num_threads(1)
        made = task(options.data)
        for seed, side in product(options.seeds, ("dense", *SIDES)):
            if not results.has(side=side, seed=seed, steps=made.steps):
                cut = Side() if side == "dense" else Cut(SIDES[side])
                row = measured(made, cut, side, LATENCY, seed, lambda *_: None)
                results.append([row])
                print(f"{side}, seed {seed}: {row['accuracy']:.2f}", file=sys.stderr, flush=True)
    elif options.into is None:
        print(tables(results.rows()))
    else:
        page = options.into.read_text(encoding="utf-8")
        options.into.write_text(placed(page, {"depth": tables(results.rows())}), encoding="utf-8")
    return 0


def tables(rows: Sequence[dict[str, Any]]) -> str:
    head = "| cut by | accuracy (seeds) | latency over dense, measured | branches left | parameters |"
    lines = [head, "|---|---|---|---|---|"]
    for side in ("dense", *SIDES):
        mine = [row for row in rows if row["side"] == side]
        if mine:
            figures = _interval([row["accuracy"] for row in mine])
            reached = ", ".join(f"{row.get('reached', 1.0):.2f}" for row in mine)
            branches = ", ".join(str(row.get("branches", "all")) for row in mine)
            size = f"{mean(row['parameters'] for row in mine):,.0f}"
            lines.append(f"| {side} | {figures} ({len(mine)}) | {reached} | {branches} | {size} |")
    return "\n".join(lines)


def _interval(figures: Sequence[float]) -> str:
    return str(bootstrap(figures)) if len(figures) > 1 else f"{figures[0]:.2f}"


if __name__ == "__main__":
    sys.exit(main())
