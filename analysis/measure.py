"""Results that survive a stop, and what may be said of them: means, intervals, paired differences.

A study appends one JSON line per finished piece, so it can be stopped at any time and resumed. Intervals
are percentile bootstrap intervals of the mean over seeds::

    mean* = mean of n draws with replacement;   interval = quantiles (1 − level)/2, (1 + level)/2 of mean*

With few seeds they are too narrow (3 seeds know little of their own spread): quote the count with them.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["Interval", "Results", "bootstrap", "machine", "paired"]

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def bootstrap(values: Sequence[float], level: float = 0.95, draws: int = 10_000) -> Interval:
    """Mean of `values` with its bootstrap interval."""
    if len(values) == 0:
        raise ValueError("values is empty: there is nothing to take a mean of")
    sample = np.asarray(values, dtype=float)
    chosen = np.random.default_rng(0).integers(len(sample), size=(draws, len(sample)))
    low, high = np.quantile(sample[chosen].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(sample.mean()), float(low), float(high), len(sample))


def paired(
    rows: Sequence[Row], side: str, other: str, value: Callable[[Row], float], by: Sequence[str]
) -> Interval:
    """value(side) − value(other) over the pieces (by) that have both."""
    found: dict[str, dict[tuple[Any, ...], float]] = {side: {}, other: {}}
    for row in rows:
        if row["side"] in found:
            found[row["side"]][tuple(row[key] for key in by)] = value(row)
    common = sorted(found[side].keys() & found[other].keys())
    return bootstrap([found[side][key] - found[other][key] for key in common])


@dataclass(frozen=True)
class Results:
    """Rows of a study in a JSON-lines file; a line cut short by a kill is dropped."""

    path: Path

    def rows(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return found

    def append(self, rows: Sequence[Row]) -> None:
        """All of a piece's rows in one write."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        whole = text == "" or text.endswith("\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("" if whole else "\n") + "".join(json.dumps(row) + "\n" for row in rows))

    def having(self, **key: Any) -> list[dict[str, Any]]:
        """The rows with these values."""
        return [row for row in self.rows() if all(row.get(name) == value for name, value in key.items())]

    def has(self, **key: Any) -> bool:
        return bool(self.having(**key))


def machine() -> dict[str, Any]:
    """What a figure has to be quoted with."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "processor": platform.machine(),
    }
