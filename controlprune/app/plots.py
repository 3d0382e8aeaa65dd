"""One picture of what the controller did: activation dynamics, resource, price, loss, coming and going.

Drawn on a `matplotlib.figure.Figure` of its own: no window, no global state, safe in a training job.
Fractions are of the dense model, in per cent; the horizontal axis is the optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from ..loop.history import History
from ..structure.saying import printable

__all__ = ["plot"]

Array = NDArray[np.float64]

RESOURCE_COLOURS = ("#1f5fa8", "#c1580a", "#2c7a3f", "#8a3a8f", "#8c6d1f")
OFF, ON, EVENT, GREY = "#b3402f", "#2c7a3f", "#222222", "#9a9a9a"
LABELS_AT_MOST = 64  # rows of the heat map that get a name; beyond, every second, third, …


def plot(history: History, path: str | Path | None = None, title: str | None = None) -> Figure:
    """Draw the run; write it to `path` (format by its ending) where one is given."""
    if len(history) == 0:
        raise ValueError("history is empty: call controller.step(loss) in the training loop before plotting")
    panels = _panels(history)
    rows = min(len(history.names), LABELS_AT_MOST)
    heat = max(1.6, 0.8 + 0.13 * rows)
    heights = [heat, *(1.5 for _ in panels)]
    figure = Figure(figsize=(9.5, sum(heights) + 0.42 * len(heights) + 0.5), layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    figure.suptitle(title if title is not None else _headline(history), fontsize=12, fontweight="bold")
    _heat_map(axes[0], history)
    for axis, draw in zip(axes[1:], panels, strict=True):
        draw(axis, history)
        _quiet(axis)
    axes[-1].set_xlabel("optimizer step")
    axes[-1].set_xlim(*_limits(history))
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    return figure


def _panels(history: History) -> list[Callable[[Axes, History], None]]:
    """The panels below the heat map; price only where there is one."""
    priced = any(value > 0 for row in history for value in row.price.values())
    return [_resource, *([_price] if priced else []), _loss, _movement]


def _headline(history: History) -> str:
    last = history[-1]
    parts = [
        f"{name} {100 * last.realised[name]:.1f} % of dense"
        + (f" (budget {100 * limit:.0f} %)" if limit is not None else "")
        for name in last.realised
        for limit in [history.budget.get(name)]
    ]
    return f"What the controller did: step {last.step} of {history.total_steps}" + "".join(
        f", {p}" for p in parts
    )


def _steps(history: History) -> Array:
    return np.array([row.step for row in history], dtype=float)


def _limits(history: History) -> tuple[float, float]:
    steps = _steps(history)
    return 0.0, max(float(history.total_steps), steps[-1], 1.0)


def _edges(steps: Array) -> Array:
    """Cell borders: a row holds from its own step until the next row's, the first one from the start."""
    tail = steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1.0)
    return np.concatenate([[min(0.0, steps[0] - 1)], steps[1:], [tail]])


def _heat_map(axis: Axes, history: History) -> None:
    """Fraction of each layer's units that is on, over time; ticks on top where tensors changed size."""
    active = np.array([row.active for row in history], dtype=float).T / np.array(history.sizes)[:, None]
    rows = np.arange(len(history.names) + 1) - 0.5
    image = axis.pcolormesh(
        _edges(_steps(history)), rows, active, cmap="viridis", norm=PowerNorm(0.7, 0, 1), rasterized=True
    )
    axis.set_ylim(len(history.names) - 0.5, -0.5)
    every = -(-len(history.names) // LABELS_AT_MOST)
    shown = np.arange(0, len(history.names), every)
    last = history[-1].active
    names = [printable(name).replace("$", r"\$") for name in history.names]  # no formulas
    axis.set_yticks(shown, [f"{names[i]}  {last[i]}/{history.sizes[i]}" for i in shown], fontsize=7)
    axis.tick_params(axis="y", length=0)
    axis.set_title(
        "Active units of each layer (name, units at the end / dense)", loc="left", fontsize=9.5, pad=14
    )
    bar = axis.figure.colorbar(image, cax=axis.inset_axes((1.012, 0.0, 0.014, 1.0)))
    bar.ax.yaxis.set_major_formatter(_PERCENT)
    bar.ax.tick_params(labelsize=7)
    _size_changes(axis, history)


def _size_changes(axis: Axes, history: History) -> None:
    """▼ above the map where tensors were physically shrunk, ▲ where they were expanded."""
    legend = []
    for kind, sign, word in (("shrink", "▼", "shrunk"), ("expand", "▲", "expanded")):
        steps = [row.step for row in history if kind in row.event.split(",")]
        for step in steps:
            axis.annotate(
                sign, (step, 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=7,
                color=EVENT, annotation_clip=False,
            )  # fmt: skip
        if steps:
            legend.append(f"{sign} {word} {len(steps)}×")
    if legend:
        axis.annotate(
            "tensors  " + "  ".join(legend), (1.0, 1.0), xycoords="axes fraction", xytext=(0, 14),
            textcoords="offset points", ha="right", fontsize=7.5,
        )  # fmt: skip


def _resource(axis: Axes, history: History) -> None:
    steps = _steps(history)
    held = np.array([sum(row.widths) for row in history]) / sum(history.sizes)
    axis.step(steps, held, where="post", color=GREY, lw=1.0, label="units kept in the tensors")
    axis.set_title("Resource use of the live network, against what was asked for", loc="left", fontsize=9.5)
    for name, colour in zip(history[-1].realised, RESOURCE_COLOURS, strict=False):
        realised = _series(history, "realised", name)
        axis.step(steps, realised, where="post", color=colour, lw=1.8, label=f"{name}, realised")
        reference = _series(history, "reference", name)
        if np.isfinite(reference).any():
            axis.step(
                steps, reference, where="post", color="black", lw=0.9, ls="--", label=f"{name}, reference"
            )
        if name in history.budget:
            axis.axhline(history.budget[name], color=colour, lw=1.0, ls=":", label=f"{name}, budget")
    axis.set_ylim(0, max(1.05, axis.get_ylim()[1]))
    axis.yaxis.set_major_formatter(_PERCENT)
    axis.set_ylabel("of dense", fontsize=8)
    _legend(axis)


def _price(axis: Axes, history: History) -> None:
    """Logarithmic; a price a thousand times below the highest is no price, and below the axis."""
    shadow = bool(history.budget)  # of gradients at their first size, whatever the loss is measured in
    title = "Shadow price" if shadow else "Price: loss that one dense model's worth of the resource costs"
    axis.set_title(title, loc="left", fontsize=9.5)
    names = list(dict.fromkeys(name for row in history for name in row.price))
    price = {name: _series(history, "price", name) for name in names}
    highest = max(np.fmax.reduce(series) for series in price.values())
    lowest = min(np.nanmin(series[series > highest / 1000], initial=highest) for series in price.values())
    for (name, series), colour in zip(price.items(), RESOURCE_COLOURS, strict=False):
        drawn = np.where(series > 0, series, np.nan)
        axis.step(_steps(history), drawn, where="post", color=colour, lw=1.3, label=name)
    _log_scale(axis, lowest / 1.5, highest * 1.5)
    axis.set_ylabel("relative" if shadow else "loss", fontsize=8)
    _legend(axis)


def _loss(axis: Axes, history: History) -> None:
    steps, loss = _steps(history), np.array([row.loss for row in history], dtype=float)
    axis.set_title("Training loss", loc="left", fontsize=9.5)
    axis.plot(steps, loss, color=GREY, lw=0.6, alpha=0.7, label="each update")
    axis.plot(steps, _smooth(loss), color="#000000", lw=1.5, label="running mean")
    finite = loss[np.isfinite(loss)]
    if len(finite) and finite.min() > 0 and finite.max() / finite.min() > 20:
        _log_scale(axis, finite.min() / 1.2, finite.max() * 1.2)
    axis.set_ylabel("loss", fontsize=8)
    _legend(axis)


def _movement(axis: Axes, history: History) -> None:
    """Units switched on upwards, off downwards; beyond ten the scale is logarithmic."""
    steps = _steps(history)
    on = np.array([sum(row.on) for row in history], dtype=float)
    off = np.array([sum(row.off) for row in history], dtype=float)
    axis.set_title("Units switched at each update: back on (up), off (down)", loc="left", fontsize=9.5)
    for count, sign, colour, word in ((on, 1, ON, "back on"), (off, -1, OFF, "off")):
        drawn = count > 0
        axis.vlines(
            steps[drawn], 0, sign * count[drawn], color=colour, lw=1.2, label=f"{word}: {int(count.sum())}"
        )
    axis.axhline(0, color=GREY, lw=0.6)
    axis.set_yscale("symlog", linthresh=10)
    extent = max(on.max(), off.max(), 5.0) * 1.2
    axis.set_ylim(-extent, extent)
    ticks = [5, *(10**k for k in range(1, 7))]
    axis.set_yticks([0, *(sign * tick for tick in ticks if tick < extent for sign in (-1, 1))])
    axis.set_yticks([], minor=True)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):g}"))
    axis.set_ylabel("units", fontsize=8)
    _legend(axis)


def _log_scale(axis: Axes, low: float, high: float) -> None:
    axis.set_yscale("log")
    axis.set_ylim(low, high)
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 300 else (1.0,)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _series(history: History, field: str, name: str) -> Array:
    """One resource's values over the rows; NaN where a row has none."""
    return np.array([getattr(row, field).get(name, np.nan) for row in history], dtype=float)


def _smooth(values: Array, share: float = 0.05) -> Array:
    """Running mean over the last `share` of the rows (fewer at the start), not-finite rows left out."""
    window = max(1, round(share * len(values)))
    known = np.isfinite(values)
    total = np.cumsum(np.where(known, values, 0.0))
    count = np.cumsum(known)
    total[window:], count[window:] = total[window:] - total[:-window], count[window:] - count[:-window]
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def _legend(axis: Axes) -> None:
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), fontsize=7.5, frameon=False, handlelength=1.6)


def _quiet(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=7.5)
    axis.grid(axis="y", color="#e6e6e6", lw=0.6)
    axis.set_axisbelow(True)


_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.0f} %")
