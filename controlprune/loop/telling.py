"""A run told to people: numbers for a board, one line for a terminal, log records for what matters.

All of it is read off the history, whose last row is the present:

    numbers(history)     {"flops/use": 0.52, "flops/budget": 0.4, "units/active": 0.61, …}    flat, finite
    line(history)        step 120/600 · FLOPs 52.0 % (budget 40 %) · price 0.013 · 61 % of units · …
    Progress(stream)     that line, rewritten in place on a terminal, elsewhere ten times a run
    News()               a log record (INFO) each: cut, returned, shrunk, expanded, budget met, finalized

`saved` is the share of a dense run's forward FLOPs that the steps so far did not take. A row holds until the
next; in its masked layout a net still runs dense.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TextIO

from ..cost.problem import Problem, feasible_range
from ..structure.saying import printable
from .history import History, Record

__all__ = ["News", "Progress", "inside", "line", "numbers", "tell_attached"]

log = logging.getLogger("controlprune")
NOTABLE = 0.05  # share of all units: fewer that leave or return at an update are no news
SLACK = 1e-6  # of a limit, for its rounding
TIMES = 10  # a run is told where no terminal is


def inside(history: History) -> bool:
    """Is every resource under budget within its limit now?"""
    if len(history) == 0 or not history.budget:
        return False
    use = history[-1].realised
    return all(name in use and use[name] <= limit * (1 + SLACK) for name, limit in history.budget.items())


def numbers(history: History) -> dict[str, float]:
    """The present row as flat numbers: fractions of dense, prices, shares of units."""
    if len(history) == 0:
        return {}
    row, units = history[-1], sum(history.sizes)
    found = {f"{name}/use": value for name, value in row.realised.items()}
    found |= {f"{name}/reference": value for name, value in row.reference.items()}
    found |= {f"{name}/budget": value for name, value in history.budget.items()}
    found |= {f"{name}/price": value for name, value in row.price.items()}
    found |= {
        "units/active": sum(row.active) / units,
        "units/held": sum(row.widths) / units,
        "units/off": float(sum(row.off)),
        "units/on": float(sum(row.on)),
        "controller/seconds": row.overhead_seconds,
    }
    saved = saved_share(history)
    if saved is not None:
        found["flops/saved"] = saved
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


def line(history: History) -> str:
    """The present in one line."""
    if len(history) == 0:
        return f"step 0/{history.total_steps}"
    row = history[-1]
    parts = [f"step {row.step}/{history.total_steps}"]
    for name, use in row.realised.items():
        limit = f" (budget {100 * history.budget[name]:.0f} %)" if name in history.budget else ""
        price = row.price.get(name, 0.0)
        parts.append(f"{name} {100 * use:.1f} %{limit}" + (f" at price {price:.3g}" if price > 0 else ""))
    parts.append(f"{100 * sum(row.active) / sum(history.sizes):.0f} % of units")
    saved = saved_share(history)
    if saved:
        parts.append(f"{100 * saved:.0f} % of FLOPs saved so far")
    if math.isfinite(row.loss):
        parts.append(f"loss {row.loss:.4g}")
    return printable(" · ".join(parts))


def saved_share(history: History) -> float | None:
    """Of the forward FLOPs of the steps so far; None where FLOPs are not counted."""
    rows = list(history)
    if not rows or "flops" not in rows[-1].realised:
        return None
    ends = [*(row.step for row in rows[1:]), rows[-1].step]
    kept = sum(_saved(row, history.sizes) * (end - row.step) for row, end in zip(rows, ends, strict=True))
    return kept / max(rows[-1].step, 1)


def _saved(row: Record, sizes: Sequence[int]) -> float:
    return 0.0 if row.widths == tuple(sizes) else max(0.0, 1.0 - row.realised["flops"])


class Told(Protocol):
    """What listeners are given: a controller."""

    @property
    def history(self) -> History: ...


@dataclass
class Progress:
    """The line after every update that shows something new."""

    stream: TextIO
    _shown: int = 0
    _at: float = 0.0

    def __call__(self, told: Told) -> None:
        history = told.history
        step, total = history[-1].step, max(history.total_steps, 1)
        ended = "finalize" in history[-1].event.split(",")
        if self.stream.isatty():
            if time.monotonic() - self._at > 0.1 or ended:
                self._at = time.monotonic()
                self.stream.write(f"\r\033[K{line(history)}" + ("\n" if ended else ""))
        elif TIMES * step // total > self._shown or ended:
            self._shown = TIMES * step // total
            self.stream.write(line(history) + "\n")
        self.stream.flush()


@dataclass
class News:
    """Log records for what changed at an update."""

    _met: bool = False
    _held: int = 0  # units in the tensors at the last update, 0: before the first

    def __call__(self, told: Told) -> None:
        history = told.history
        row, units = history[-1], sum(history.sizes)
        kinds = row.event.split(",")
        for word, count in (("cut", sum(row.off)), ("returned", sum(row.on))):
            if count > NOTABLE * units:
                log.info("step %d: %s: %d of %d units", row.step, word, count, units)
        held = sum(row.widths)
        if held != (self._held or units):
            word = "shrunk" if held < (self._held or units) else "expanded"
            log.info("step %d: %s: %d of %d units are in the tensors", row.step, word, held, units)
        self._held = held
        if inside(history) != self._met:
            self._met = not self._met
            word = "budget met" if self._met else "above budget"
            log.info("step %d: %s: %s", row.step, word, line(history))
        if "finalize" in kinds:
            log.info("finalize: %s", line(history))


def tell_attached(problem: Problem) -> None:
    """What there is to prune, and how far each budget could go."""
    structure = problem.structure
    ranges = []
    for name in [name for name in problem.budget if name not in problem.totals]:
        [(least, dense)] = feasible_range([problem.costs[name]], problem.floors, structure.sizes)
        ranges.append(f"{name} can go to {100 * least / dense:.1f} %")
    log.info(
        "attached: %d groups of %d units, %d refused; %s",
        len(structure.groups), sum(structure.sizes), len(structure.refused), ", ".join(ranges) or "a price",
    )  # fmt: skip
