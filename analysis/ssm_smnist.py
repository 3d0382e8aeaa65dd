"""Sequential MNIST: states truncated in training, beside the full layer and small ones trained directly.

    python analysis/ssm_smnist.py --data ../shared/data --seeds 3 --steps 1600           # 14×14, a CPU
    python analysis/ssm_smnist.py --data ../shared/data --side 28 --steps 200000 --device cuda \
        --rate 4e-4 --constant --seeds 5                                             # the published table
    python analysis/ssm_smnist.py --only-summary

Pixels one by one, in rows; one block (BatchNorm, LRU of H = 8, GELU, dropout, GLU, dropout, residual), mean
over time, linear. Sides: `full` (256 states); `cut S`: from 256 to S states, in five cuts of one ratio in the
first tenth of the run; `early S`: in three cuts in its first 3 %; `direct S`: S states from the start;
`tau T`: cuts by the tolerance T alone. A piece is one (side, seed); finished pieces are not run again. All
sides: the same batches, rate and steps. Time is process CPU time of the whole run, evaluation left out (on a
GPU: synchronised seconds).
Published figures (arXiv 2510.02823, 784 steps; the speed second hand) stand beside ours.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from measure import Results, machine
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

from controlprune import ssm
from controlprune.app.tasks import load

FULL, FEATURES, BATCH = 256, 8, 50
PUBLISHED = {
    "full": 97.3,
    "cut 13": 95.9,
    "direct 13": 92.6,
    "cut 28": 96.9,
    "direct 28": 96.0,
    "cut 47": 96.9,
    "cut 76": 96.9,
    "direct 76": 96.4,
}
FASTER = {"cut 28": 2.6}  # full ÷ compressed, whole run, published (second hand)


class Block(nn.Module):
    """y = x + drop(GLU(drop(GELU(LRU(norm x)))))."""

    def __init__(self, features: int, states: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(features, affine=False)
        self.lru = ssm.LRU(features, states)
        self.mix = nn.Linear(features, 2 * features)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x.flatten(0, 1)).view_as(x)
        mixed = self.mix(self.dropout(nn.functional.gelu(self.lru(normed))))
        return x + self.dropout(nn.functional.glu(mixed))


class Classifier(nn.Module):
    def __init__(self, states: int, blocks: int = 1, dropout: float = 0.1) -> None:
        super().__init__()
        self.encode = nn.Linear(1, FEATURES)
        self.blocks = nn.Sequential(*(Block(FEATURES, states, dropout) for _ in range(blocks)))
        self.head = nn.Linear(FEATURES, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.encode(x)).mean(1))


def main() -> int:
    options = _options()
    results = Results(options.out)
    if not options.only_summary:
        torch.set_num_threads(1)
        train, test = _sequences(options)
        for seed in range(options.seeds):
            for side in options.sides:
                if not results.has(side=side, seed=seed, steps=options.steps, length=options.side**2):
                    results.append([piece(side, seed, options, train, test)])
                    print(results.rows()[-1], file=sys.stderr, flush=True)
    print(summary(results.rows()))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ["full", "cut 13", "direct 13", "cut 28", "direct 28", "cut 47", "direct 47"]
    parser.add_argument("--data", type=Path, help="folder with mnist/ (default: the hub)")
    parser.add_argument("--side", type=int, default=14, choices=[14, 28], help="pixels of an edge")
    parser.add_argument("--sides", nargs="+", default=default)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--rate", type=float, default=1.5e-2)
    parser.add_argument("--constant", action="store_true", help="constant rate (default: cosine to zero)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("analysis/results/ssm_smnist.jsonl"))
    parser.add_argument("--only-summary", action="store_true")
    return parser.parse_args()


Split = tuple[Tensor, Tensor]


def _sequences(options: argparse.Namespace) -> tuple[Split, Split]:
    task = load("mnist", options.data)
    pool = 28 // options.side

    def rows(split: Split) -> Split:
        x = avg_pool2d(split[0], pool).flatten(1)[..., None]
        return x.to(options.device), split[1].to(options.device)

    return rows(task.train), rows(task.test)


def piece(side: str, seed: int, options: argparse.Namespace, train: Split, test: Split) -> dict[str, Any]:
    """One run from the first step to the last."""
    torch.manual_seed(seed)
    kind, _, number = side.partition(" ")
    model = Classifier(int(number) if kind == "direct" else FULL).to(options.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.rate)
    truncation = _truncation(kind, number, model, optimizer, options.steps)
    order = torch.Generator().manual_seed(1000 + seed)
    clock = time.process_time if options.device == "cpu" else _synchronised
    began, losses = clock(), []
    for step in range(options.steps):
        chosen = torch.randint(len(train[0]), (BATCH,), generator=order)
        loss = cross_entropy(model(train[0][chosen]), train[1][chosen])
        loss.backward()
        cosine = 0.5 * (1 + math.cos(math.pi * step / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = options.rate * (1.0 if options.constant else cosine)
        optimizer.step()
        if truncation:
            truncation.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    seconds = clock() - began
    states = [ssm.states_of(layer) for _, layer in ssm.state_space_layers(model)]
    return {
        "side": side,
        "seed": seed,
        "steps": options.steps,
        "length": len(train[0][0]),
        "rate": options.rate,
        "states": states[0],
        "accuracy": accuracy(model, test),
        "loss": float(torch.stack(losses)[-100:].mean()),
        "seconds": seconds,
        "cuts": _told(truncation),
        **machine(),
    }


def _truncation(
    kind: str, number: str, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int
) -> ssm.Truncation | None:
    cuts = min(5, steps // 10)
    if kind == "tau":
        return ssm.Truncation(model, optimizer, total_steps=steps, tolerance=float(number), cuts=cuts)
    if kind in ("cut", "early"):
        window, cuts = (0.1, cuts) if kind == "cut" else (0.03, min(3, cuts))
        return ssm.Truncation(
            model,
            optimizer,
            total_steps=steps,
            tolerance=0.0,
            states=int(number),
            window=window,
            cuts=cuts,
        )
    return None


def _told(truncation: ssm.Truncation | None) -> list[dict[str, Any]]:
    records = truncation.history if truncation else []
    return [
        {
            "step": record.step,
            "states": [cut.before for cut in record.cuts] + [cut.after for cut in record.cuts],
            "bound": [cut.bound for cut in record.cuts],
            "values": [[float(f"{v:.4g}") for v in values[0]] for values in record.values.values()],
        }
        for record in records
    ]


def _synchronised() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    model.eval()
    parts = zip(split[0].split(500), split[1].split(500), strict=True)
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in parts)
    model.train()
    return 100 * right / len(split[0])


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Means over seeds, and what was published at 784 steps."""
    head = ["side", "states", "accuracy", "spread", "seconds", "full/time", "seeds", "published"]
    lines = ["".join(f"{name:>11}" for name in head)]
    for length in sorted({row["length"] for row in rows}):
        mine = [row for row in rows if row["length"] == length]
        full = {row["seed"]: row["seconds"] for row in mine if row["side"] == "full"}
        for side in dict.fromkeys(row["side"] for row in mine):
            found = [row for row in mine if row["side"] == side]
            scores = [row["accuracy"] for row in found]
            faster = [full[row["seed"]] / row["seconds"] for row in found if row["seed"] in full]
            figures = [
                mean([row["states"] for row in found]),
                mean(scores),
                stdev(scores) if len(scores) > 1 else math.nan,
                mean([row["seconds"] for row in found]),
                mean(faster) if faster else math.nan,
                len(found),
                PUBLISHED.get(side, math.nan),
            ]
            lines.append(f"{side:>11}" + "".join(f"{figure:11.2f}" for figure in figures))
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
