"""What masks of single weights cost a training step, and what live tiles save: interleaved, on one thread.

    python -m analysis.masking run                             a few minutes, one line a case
    python -m analysis.masking tables --into docs/results.md

masks    a training step of the MLP 784-300-100 (SGD with momentum, 128 rows) and of the bench's CNN
         (AdamW, 64 rows of 3×16×16) with a tenth of the weights on: dense; dense again (the A/A control);
         masked and held (no update in between); and RigL, updates and all
blocks   linear layers with tiles of 64×32: forward, and forward and backward, over dense

Process CPU time. Sides take turns; a figure is the median over rounds of the ratio to dense in the same
round, with the quartiles of that ratio.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

import controlprune as cp
from controlprune.app.tasks import mlp, plain_net
from controlprune.plant.block_linear import tiles, to_blocks

from .bench.run import provenance
from .bench.tables import placed
from .measure import Results
from .weights import live

__all__ = ["main", "tables"]

RESULTS = Path(__file__).parent / "results" / "masking.jsonl"
ROUNDS = 40
DENSITY = 0.1
Turn = Callable[[], object]
Net = Callable[[], nn.Module]
Optimizers = Callable[[Any], Optimizer]
Policy = Callable[[], cp.Policy] | None

NETS: dict[str, tuple[Net, Optimizers, tuple[int, ...], int]] = {  # the last: steps in a turn
    "MLP 784-300-100, 128 rows": (
        lambda: mlp(784, (300, 100)),
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        (128, 784),
        5,
    ),
    "CNN 32-64-128-128, 64 rows": (
        lambda: plain_net(3),
        lambda p: torch.optim.AdamW(p, lr=1e-3),
        (64, 3, 16, 16),
        1,
    ),
}
LAYERS = ((1024, 1024), (1536, 384))
POLICIES: dict[str, Policy] = {
    "dense again": None,
    "masked, held": lambda: cp.Static(layers="erk"),
    "RigL": lambda: cp.RigL(layers="erk"),
}


def in_turn(turns: Mapping[str, Turn]) -> dict[str, list[float]]:
    """CPU seconds of every turn, round by round; the first few are not counted."""
    found: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(ROUNDS + 3):
        for name, turn in turns.items():
            began = time.process_time()
            turn()
            if number >= 3:
                found[name].append(time.process_time() - began)
    return found


def masks(name: str) -> list[dict[str, Any]]:
    make, optimizer, shape, steps = NETS[name]
    turns = {"dense": None} | POLICIES
    times = in_turn({side: _steps(make, optimizer, shape, p, steps) for side, p in turns.items()})
    return [
        {"kind": "masks", "case": name, "side": side, "ms": 1e3 * median(times[side]) / steps}
        | _ratio(times[side], times["dense"])
        for side in times
    ]


def _steps(make: Net, kind: Optimizers, shape: tuple[int, ...], policy: Policy, count: int) -> Turn:
    torch.manual_seed(0)
    model = make()
    optimizer, x, y = kind(model.parameters()), torch.randn(shape), torch.randint(10, shape[:1])
    controller = policy and cp.attach(
        model,
        optimizer,
        budget=cp.Budget(params=str(live(model, DENSITY))),
        example_inputs=(x[:1],),
        total_steps=6000,
        granularity="weight",
        policy=policy(),
    )

    def steps() -> None:
        for _ in range(count):
            loss = cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            if controller is not None:
                controller.step(loss)
            optimizer.zero_grad()

    return steps


def blocks(shape: tuple[int, int], share: float, rows: int = 256) -> dict[str, Any]:
    torch.manual_seed(0)
    dense = nn.Linear(shape[1], shape[0])
    on = torch.rand(shape[0] // 64, shape[1] // 32) < share
    with torch.no_grad():
        tiles(dense.weight, 64, 32).mul_(on[:, :, None, None])
    small = to_blocks(copy.deepcopy(dense), on)
    x, seen = torch.randn(rows, shape[1], requires_grad=True), torch.randn(rows, shape[0])
    found: dict[str, Any] = {
        "kind": "blocks",
        "case": f"{shape[0]}x{shape[1]}",
        "live": float(on.float().mean()),
    }
    for name, turn in (
        ("forward", partial(_forward, x.detach())),
        ("step", partial(_there_and_back, x, seen)),
    ):
        times = in_turn({"dense": partial(turn, dense), "blocks": partial(turn, small)})
        found[name] = _ratio(times["dense"], times["blocks"])["ratio"]
    return found


@torch.no_grad()
def _forward(x: Tensor, layer: nn.Module) -> None:
    layer(x)


def _there_and_back(x: Tensor, seen: Tensor, layer: nn.Module) -> None:
    layer(x).backward(seen)
    x.grad = None
    layer.zero_grad()


def _ratio(times: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    each = [a / b for a, b in zip(times, others, strict=True)]
    low, _, high = quantiles(each, n=4)
    return {"ratio": median(each), "low": low, "high": high}


def main(arguments: Sequence[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("command", choices=("run", "tables"))
    parser.add_argument("--into", type=Path, metavar="PAGE.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    results = Results(options.results)
    if options.command == "run":
        torch.set_num_threads(1)
        for name in NETS:
            results.append([row | provenance() for row in masks(name)])
        for shape in LAYERS:
            for share in (0.5, 0.2, 0.1):
                results.append([blocks(shape, share) | provenance()])
    elif options.into is None:
        print("\n\n".join(tables(results.rows()).values()))
    else:
        page = options.into.read_text(encoding="utf-8")
        options.into.write_text(placed(page, tables(results.rows())), encoding="utf-8")
    return 0


def tables(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Of the last run of every case."""
    last = {(r["kind"], r["case"], r.get("side"), round(r.get("live", 0.0), 1)): r for r in rows}.values()
    head = ["| a training step of | side | ms | over dense | quartiles |", "|---|---|---|---|---|"]
    held = [
        f"| {r['case']} | {r['side']} | {r['ms']:.2f} | {r['ratio']:.3f} | {r['low']:.3f} … {r['high']:.3f} |"
        for r in last
        if r["kind"] == "masks"
    ]
    top = ["| linear layer, 64x32 | live tiles | forward | forward and backward |", "|---|---|---|---|"]
    saved = [
        f"| {r['case']} | {100 * r['live']:.0f} % | {r['forward']:.1f}× | {r['step']:.1f}× |"
        for r in last
        if r["kind"] == "blocks"
    ]
    return {"masks": "\n".join([*head, *held]), "blocks": "\n".join([*top, *saved])}


if __name__ == "__main__":
    sys.exit(main())
