"""Rows -> tables: means over seeds, 95 % bootstrap intervals, differences paired by seed.

Of two rows of the same side, budget, seed and number of steps the later counts. "Minus best rival": the rival
is the side of the best mean that is neither dense nor ours. "Steps to 99 %": the first look from which on the
figure stayed within 1 % of what dense reached at its last look. Of a loss, less is better.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from ..measure import Results, bootstrap

__all__ = ["cost_of", "placed", "tables"]

Row = dict[str, Any]
COLUMNS = (
    "side", "seeds", "{figure}", "minus dense", "minus best rival", "FLOPs", "training FLOPs", "time/dense",
    "steps to 99 %", "parameters", "latency",
)  # fmt: skip
GUESS = 120.0  # CPU seconds of a training nobody has made yet


def cost_of(folder: Path, task: str, side: str, budget: float, steps: int) -> float:
    """CPU seconds of one training: as it was, as dense was, or a guess."""
    rows = [r for r in Results(folder / f"{task}.jsonl").rows() if r["steps"] == steps]
    same = [r["seconds"] for r in rows if r["side"] == side and r["budget"] == budget]
    dense = [r["seconds"] for r in rows if r["side"] == "dense"]
    return mean(same or dense or [GUESS])


def tables(folder: Path, task: str, shown: Collection[str] | None = None) -> str:
    """One table per number of steps and budget, as Markdown. `shown`: these sides only."""
    kept = _latest(Results(folder / f"{task}.jsonl").rows())
    rows = [row for row in kept if shown is None or row["side"] in shown]
    parts = []
    for steps in sorted({row["steps"] for row in rows}):
        own = [row for row in rows if row["steps"] == steps]
        parts += [
            f"**{task}, {steps} steps, {100 * budget:.0f} % of the FLOPs**\n\n{_table(own, budget)}"
            for budget in sorted({r["budget"] for r in own if r["side"] != "dense"}, reverse=True)
        ]
    return "\n\n".join(parts)


def placed(page: str, made: Mapping[str, str]) -> str:
    """The page with each task's tables between its marks."""
    for task, text in made.items():
        mark = rf"(<!-- bench {re.escape(task)} -->\n).*?(<!-- end -->)"
        page = re.sub(mark, lambda m, text=text: f"{m[1]}\n{text}\n\n{m[2]}", page, flags=re.S)
    return page


def _latest(rows: list[Row]) -> list[Row]:
    """Dense knows no budget."""
    last = {}
    for row in rows:
        budget = None if row["side"] == "dense" else row["budget"]
        last[row["side"], budget, row["seed"], row["steps"]] = row
    return list(last.values())


def _table(rows: list[Row], budget: float) -> str:
    figure = "accuracy" if "accuracy" in rows[0] else "loss"
    better = 1 if figure == "accuracy" else -1
    dense = [r for r in rows if r["side"] == "dense"]
    own = [r for r in rows if r["budget"] == budget and r["side"] != "dense"]

    def reached(side: str) -> float:
        return better * mean(r[figure] for r in own if r["side"] == side)

    sides = sorted({r["side"] for r in own}, key=reached, reverse=True)
    rivals = [side for side in sides if not side.startswith("ours")]
    best = [r for r in own if r["side"] == rivals[0]] if rivals else []
    lines = ["| " + " | ".join(COLUMNS).format(figure=figure) + " |", "|" + "---|" * len(COLUMNS)]
    for side in (["dense"] if dense else []) + sides:
        mine = dense if side == "dense" else [r for r in own if r["side"] == side]
        lines.append(_line(side, mine, dense, best, figure))
    return "\n".join(lines)


def _line(side: str, mine: list[Row], dense: list[Row], best: list[Row], figure: str) -> str:
    beside = mean(r["seconds"] / r["kernel"] for r in dense) if dense else float("nan")
    columns = [
        f"**{side}**" if side.startswith("ours") else side,
        str(len(mine)),
        _interval([r[figure] for r in mine], figure),
        "" if side == "dense" else _apart(mine, dense, figure),
        "" if side == "dense" or mine == best else _apart(mine, best, figure),
        f"{mean(r['flops'] for r in mine):.3f}",
        f"{mean(r['train_flops'] for r in mine):.3f}",
        f"{mean(r['seconds'] / r['kernel'] for r in mine) / beside:.2f}",
        _steps(mine, dense, 1 if figure == "accuracy" else -1),
        f"{mean(r['parameters'] for r in mine) / 1e6:.3g} M",
        f"{1000 * mean(r['latency'] for r in mine):.2f} ms",
    ]
    return "| " + " | ".join(columns) + " |"


def _apart(mine: list[Row], other: list[Row], figure: str) -> str:
    """Mean of the differences over the seeds that both have."""
    theirs = {r["seed"]: r[figure] for r in other}
    return _interval([r[figure] - theirs[r["seed"]] for r in mine if r["seed"] in theirs], figure, sign="+")


def _interval(values: list[float], figure: str, sign: str = "") -> str:
    form = f"{sign}.{2 if figure == 'accuracy' else 3}f"
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    found = bootstrap(values)
    return f"{found.mean:{form}} [{found.low:{form}}, {found.high:{form}}]"


def _steps(mine: list[Row], dense: list[Row], better: int) -> str:
    """Mean over the seeds; — where a seed does not get there."""
    goals = {r["seed"]: r["curve"][-1][1] for r in dense if r.get("curve")}
    found = [
        _reached(r["curve"], goals[r["seed"]], better) for r in mine if r.get("curve") and r["seed"] in goals
    ]
    if not found:
        return ""
    steps = [step for step in found if step is not None]
    return f"{mean(steps):.0f}" if len(steps) == len(found) else "—"


def _reached(curve: list[tuple[int, float]], goal: float, better: int) -> int | None:
    """The first look from which on the figure is within 1 % of the goal."""
    least = goal * (1 - 0.01 * better)
    since = None
    for step, figure in curve:
        if better * figure < better * least:
            since = None
        elif since is None:
            since = step
    return since
