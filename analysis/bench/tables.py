"""Rows -> tables: means over seeds, 95 % bootstrap intervals, differences paired by seed."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from ..measure import Results, bootstrap, paired

__all__ = ["cost_of", "tables"]

Row = dict[str, Any]
COLUMNS = (
    "side", "seeds", "accuracy", "minus dense", "FLOPs", "training FLOPs", "time/dense", "parameters",
    "latency",
)  # fmt: skip
GUESS = 120.0  # CPU seconds of a training nobody has made yet


def cost_of(folder: Path, task: str, side: str, budget: float, steps: int) -> float:
    """CPU seconds of one training: as it was, as dense was, or a guess."""
    rows = [r for r in Results(folder / f"{task}.jsonl").rows() if r["steps"] == steps]
    same = [r["seconds"] for r in rows if r["side"] == side and r["budget"] == budget]
    dense = [r["seconds"] for r in rows if r["side"] == "dense"]
    return mean(same or dense or [GUESS])


def tables(folder: Path, tasks: list[str]) -> str:
    """One table per task and budget, as Markdown."""
    parts = []
    for task in tasks:
        rows = Results(folder / f"{task}.jsonl").rows()
        for steps in sorted({row["steps"] for row in rows}):
            own = [row for row in rows if row["steps"] == steps]
            parts += [
                f"### {task}, {steps} steps, FLOPs budget {budget}\n\n{_table(own, budget)}"
                for budget in sorted({r["budget"] for r in own if r["side"] != "dense"}, reverse=True)
            ]
    return "\n\n".join(parts) or "no results yet"


def _table(rows: list[Row], budget: float) -> str:
    dense = [r for r in rows if r["side"] == "dense"]
    own = [r for r in rows if r["budget"] == budget and r["side"] != "dense"]
    sides = sorted(
        {r["side"] for r in own}, key=lambda s: -mean(r["accuracy"] for r in own if r["side"] == s)
    )
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for side in (["dense"] if dense else []) + sides:
        mine = dense if side == "dense" else [r for r in own if r["side"] == side]
        lines.append(_line(side, mine, dense))
    return "\n".join(lines)


def _line(side: str, mine: list[Row], dense: list[Row]) -> str:
    apart = ""
    common = {r["seed"] for r in mine} & {r["seed"] for r in dense}
    if side != "dense" and common:
        apart = str(paired([*mine, *dense], side, "dense", lambda r: r["accuracy"], ["seed"]))
    beside = mean(r["seconds"] / r["kernel"] for r in dense) if dense else float("nan")
    columns = [
        side,
        str(len(mine)),
        str(bootstrap([r["accuracy"] for r in mine])),
        apart,
        f"{mean(r['flops'] for r in mine):.3f}",
        f"{mean(r['train_flops'] for r in mine):.3f}",
        f"{mean(r['seconds'] / r['kernel'] for r in mine) / beside:.2f}",
        f"{mean(r['parameters'] for r in mine) / 1e6:.2f} M",
        f"{1000 * mean(r['latency'] for r in mine):.2f} ms",
    ]
    return "| " + " | ".join(columns) + " |"
