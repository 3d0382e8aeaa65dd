"""Hankel singular values over training, layer by layer: what each state passes on, and when it was cut."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..ssm.truncation import Record

__all__ = ["plot_values"]

EVENT, GREY = "#b3402f", "#9a9a9a"
LOWEST = 1e-6  # of the largest value: below it the axis ends


def plot_values(history: Sequence[Record], path: str | Path | None = None) -> Figure:
    """Draw the records of a `Truncation`; write to `path` (format by its ending) where one is given."""
    if not history:
        raise ValueError("history is empty: nothing was recorded yet; give Truncation(record_every=…)")
    layers = list(history[0].values)
    figure = Figure(figsize=(8.0, 1.0 + 2.6 * len(layers)), layout="constrained")
    axes = figure.subplots(len(layers), 1, sharex=True, squeeze=False)[:, 0]
    for axis, layer in zip(axes, layers, strict=True):
        _panel(axis, history, layer)
    axes[-1].set_xlabel("optimizer step")
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    return figure


def _panel(axis: Axes, history: Sequence[Record], layer: str) -> None:
    steps = [record.step for record in history]
    values = [np.sort(record.values[layer].max(0))[::-1] for record in history]
    most = max(map(len, values))
    table = np.full((len(history), most), np.nan)
    for row, found in zip(table, values, strict=True):
        row[: len(found)] = found
    floor = LOWEST * np.nanmax(table)
    table[table < floor] = np.nan
    for i in range(most):
        shade = 0.25 + 0.6 * i / most
        axis.plot(steps, table[:, i], color=(0.12, 0.37, 0.66, 1.1 - shade), lw=0.8)
    for record in history:
        for cut in record.cuts:
            if cut.layer == layer:
                axis.axvline(record.step, color=EVENT, lw=0.8, ls=":")
                axis.annotate(
                    f" {cut.before} → {cut.after}",
                    (record.step, 0.02),
                    xycoords=("data", "axes fraction"),
                    rotation=90,
                    fontsize=7,
                    color=EVENT,
                    va="bottom",
                    ha="left",
                )
    axis.set_yscale("log")
    axis.set_ylabel("σ")
    axis.set_title(f"{layer}: Hankel singular values, {history[-1].states[layer]} states left", loc="left")
    axis.title.set_fontsize(10)
    axis.spines[["top", "right"]].set_visible(False)
