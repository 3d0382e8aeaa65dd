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

__all__ = ["cost_of", "placed", "summary", "tables"]

Row = dict[str, Any]
COLUMNS = (
    "side", "seeds", "{figure}", "minus dense", "minus best rival", "FLOPs", "training FLOPs", "time/dense",
    "steps to 99 %", "parameters", "latency",
)  # fmt: skip
SUMMARY = (
    "task, share of the FLOPs", "seeds", "dense", "ours", "small from scratch", "best rival", "ours minus it",
)  # fmt: skip
TIMED = ("seconds", "kernel", "busy")  # busy: so much else ran that the time does not count
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


def summary(folder: Path, tasks: Collection[str], shown: Collection[str]) -> str:
    """One line per task and budget: ours beside dense, the small net from scratch and the best rival."""
    lines = ["| " + " | ".join(SUMMARY) + " |", "|" + "---|" * len(SUMMARY)]
    for task in tasks:
        rows = [r for r in _latest(Results(folder / f"{task}.jsonl").rows()) if r["side"] in shown]
        kinds = {(r["steps"], r["budget"]) for r in rows if r["side"] == "ours"}
        usual = min((steps for steps, _ in kinds), default=0)
        for steps, budget in sorted(kinds, key=lambda kind: (kind[0], -kind[1])):
            same = [
                r for r in rows if r["steps"] == steps and (r["budget"] == budget or r["side"] == "dense")
            ]
            length = "" if steps == usual else f" ({steps:,} steps)"
            lines.append(_summed(f"{task}, {100 * budget:.0f} %{length}", same))
    return "\n".join(lines) if len(lines) > 2 else ""


def _summed(name: str, rows: list[Row]) -> str:
    figure = _figure(rows)
    sides = {side: [r for r in rows if r["side"] == side] for side in {r["side"] for r in rows}}
    rival = max(_rivals(sides), key=lambda side: _reached(sides[side], figure), default=None)
    ours, dense = sides["ours"], sides.get("dense", [])
    best = sides[rival] if rival else []

    def shown(mine: list[Row]) -> str:
        return (
            f"{mean(r[figure] for r in mine):{_form(figure)}} ({_time(mine, dense) or '—'})" if mine else ""
        )

    columns = [
        name + (" (loss)" if figure == "loss" else ""),
        str(len(ours)),
        shown(dense),
        f"**{shown(ours)}**",
        shown(sides.get("small from scratch", [])),
        f"{shown(best)}: {rival}" if rival else "",
        _apart(ours, best, figure),
    ]
    return "| " + " | ".join(columns) + " |"


def placed(page: str, made: Mapping[str, str]) -> str:
    """The page with each task's tables between its marks."""
    for task, text in made.items():
        mark = rf"(<!-- bench {re.escape(task)} -->\n).*?(<!-- end -->)"
        page = re.sub(mark, lambda m, text=text: f"{m[1]}\n{text}\n\n{m[2]}", page, flags=re.S)
    return page


def _latest(rows: list[Row]) -> list[Row]:
    """Dense knows no budget. A row whose time does not count keeps that of the row it replaces."""
    last: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        budget = None if row["side"] == "dense" else row["budget"]
        key = row["side"], budget, row["seed"], row["steps"]
        timed = last[key] if row.get("busy") and key in last else row
        last[key] = row | {name: timed.get(name) for name in TIMED}
    return list(last.values())


def _table(rows: list[Row], budget: float) -> str:
    figure = _figure(rows)
    dense = [r for r in rows if r["side"] == "dense"]
    own = [r for r in rows if r["budget"] == budget and r["side"] != "dense"]
    found = {side: [r for r in own if r["side"] == side] for side in {r["side"] for r in own}}
    sides = dict(sorted(found.items(), key=lambda pair: -_reached(pair[1], figure)))
    best = sides[rivals[0]] if (rivals := _rivals(sides)) else []
    lines = ["| " + " | ".join(COLUMNS).format(figure=figure) + " |", "|" + "---|" * len(COLUMNS)]
    for side, mine in [("dense", dense)] * bool(dense) + [*sides.items()]:
        lines.append(_line(side, mine, dense, best, figure))
    return "\n".join(lines)


def _figure(rows: list[Row]) -> str:
    return "accuracy" if "accuracy" in rows[0] else "loss"


def _reached(rows: list[Row], figure: str) -> float:
    """More is better."""
    return mean(r[figure] for r in rows) * (1 if figure == "accuracy" else -1)


def _rivals(sides: Mapping[str, list[Row]]) -> list[str]:
    """Neither dense nor ours, and run on as many seeds as ours (as far as any was)."""
    others = {side: len(rows) for side, rows in sides.items() if side != "dense" and side[:4] != "ours"}
    enough = min(len(sides.get("ours", [])), max(others.values(), default=0))
    return [side for side, count in others.items() if count >= enough]


def _time(mine: list[Row], dense: list[Row]) -> str:
    """CPU time of the training over that of dense, each in units of the machine as it was."""
    each = [[r["seconds"] / r["kernel"] for r in rows if not r["busy"]] for rows in (mine, dense)]
    return f"{mean(each[0]) / mean(each[1]):.2f}" if all(each) else ""


def _form(figure: str) -> str:
    return ".2f" if figure == "accuracy" else ".3f"


def _line(side: str, mine: list[Row], dense: list[Row], best: list[Row], figure: str) -> str:
    columns = [
        f"**{side}**" if side.startswith("ours") else side,
        str(len(mine)),
        _interval([r[figure] for r in mine], figure),
        "" if side == "dense" else _apart(mine, dense, figure),
        "" if side == "dense" or mine == best else _apart(mine, best, figure),
        f"{mean(r['flops'] for r in mine):.3f}",
        f"{mean(r['train_flops'] for r in mine):.3f}",
        _time(mine, dense),
        _steps(mine, dense, 1 if figure == "accuracy" else -1),
        _mean(mine, "parameters", 1e-6, ".3g", "M"),
        _mean(mine, "latency", 1e3, ".2f", "ms"),
    ]
    return "| " + " | ".join(columns) + " |"


def _mean(rows: list[Row], key: str, scale: float, form: str, unit: str) -> str:
    """Over the rows that have it."""
    known = [scale * r[key] for r in rows if key in r]
    return f"{mean(known):{form}} {unit}" if known else ""


def _apart(mine: list[Row], other: list[Row], figure: str) -> str:
    """Mean of the differences over the seeds that both have."""
    theirs = {r["seed"]: r[figure] for r in other}
    return _interval([r[figure] - theirs[r["seed"]] for r in mine if r["seed"] in theirs], figure, sign="+")


def _interval(values: list[float], figure: str, sign: str = "") -> str:
    form = sign + _form(figure)
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
        _since(r["curve"], goals[r["seed"]], better) for r in mine if r.get("curve") and r["seed"] in goals
    ]
    if not found:
        return ""
    steps = [step for step in found if step is not None]
    return f"{mean(steps):.0f}" if len(steps) == len(found) else "—"


def _since(curve: list[tuple[int, float]], goal: float, better: int) -> int | None:
    """The first look from which on the figure is within 1 % of the goal."""
    least = goal * (1 - 0.01 * better)
    since = None
    for step, figure in curve:
        if better * figure < better * least:
            since = None
        elif since is None:
            since = step
    return since
