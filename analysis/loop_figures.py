"""The pictures of `closed_loop.py`: plant and predictions, margins, disturbances and rivals.

Drawn on figures of their own, no window. Frequency in radians per update of the controller (Nyquist: π), use
in per cent of dense, the price relative to its feed-forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import control
import numpy as np
from loop_studies import JUMP, Rejection, Rival, Step
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from plant import Fit, Trace, predict, predicted_sensitivity

from controlprune.price.design import Margins, loop
from controlprune.price.identify import Response
from controlprune.price.pi import PI

__all__ = ["margins_figure", "plant_figure", "rivals_figure"]

BLUE, ORANGE, GREEN, RED, GREY = "#1f5fa8", "#c1580a", "#2c7a3f", "#b3402f", "#8a8a8a"
SHOWN = 80  # updates of the run that is drawn
OMEGA = np.geomspace(0.01, np.pi, 800)
LATE = 5  # updates: the delay that is put in
OUTSIDE = 3.0  # the part of the z plane that is drawn


def plant_figure(fit: Fit, traces: Sequence[Trace], steps: Mapping[str, Step]) -> Figure:
    figure = Figure(figsize=(10.5, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.4, 1), height_ratios=(2.2, 1))
    _predicted_run(figure.add_subplot(grid[0, 0]), fit, traces[0])
    _prices(figure.add_subplot(grid[1, 0]), traces[0])
    _steps(figure.add_subplot(grid[:, 1]), fit, steps)
    return figure


def _predicted_run(axis: Axes, fit: Fit, trace: Trace) -> None:
    k = np.arange(SHOWN)
    axis.plot(k, 100 * trace.use[-SHOWN:], color="black", lw=1.6, label="actual")
    for ahead, colour, style in ((1, BLUE, "-"), (10, ORANGE, "--")):
        ahead_of = 100 * predict(fit, 0, trace, ahead)[-SHOWN:]
        miss = 100 * fit.errors[ahead][0]
        axis.plot(
            k,
            ahead_of,
            color=colour,
            lw=1.2,
            ls=style,
            label=f"{ahead} ahead ({miss:.1f} points off)",
        )
    axis.set_ylabel("FLOPs in use, % of dense")
    axis.set_title("Predicted in the part of a run that the fit has not seen", fontsize=10)
    axis.tick_params(labelbottom=False)
    axis.margins(x=0.01, y=0.22)
    axis.legend(fontsize=8, loc="upper left", ncols=3, frameon=False)
    _quiet(axis)


def _prices(axis: Axes, trace: Trace) -> None:
    axis.step(np.arange(SHOWN), trace.log_price[-SHOWN:], color=GREY, where="mid", lw=1.3)
    axis.set_ylabel("log relative price")
    axis.set_xlabel("update (4 optimizer steps each)")
    axis.margins(x=0.01)
    _quiet(axis)


def _steps(axis: Axes, fit: Fit, steps: Mapping[str, Step]) -> None:
    for (name, step), colour in zip(steps.items(), (BLUE, ORANGE), strict=True):
        k = np.arange(len(step.actual))
        axis.fill_between(
            k, 100 * (step.actual - 2 * step.error), 100 * (step.actual + 2 * step.error), color=colour,
            alpha=0.2, lw=0,
        )  # fmt: skip
        axis.plot(
            k, 100 * step.actual, color=colour, lw=1.8, label=f"actual, price {name} ({step.count} steps)"
        )
        axis.plot(k, 100 * step.predicted, color=colour, lw=1.4, ls="--", label="predicted")
    response = fit.response
    axis.set_title(f"Step of the log price by ±{JUMP}", fontsize=10)
    plant = f"gain {response.gain:.2f}, pole {response.pole:.2f}, delay {response.delay}"
    axis.text(0.98, 0.03, f"identified: {plant}", transform=axis.transAxes, ha="right", fontsize=8)
    axis.axhline(0, color=GREY, lw=0.6)
    axis.set_xlabel("updates since the step")
    axis.set_ylabel("change of FLOPs in use, points of dense")
    axis.set_xlim(0, len(next(iter(steps.values())).actual) - 1)
    axis.set_xticks(range(0, 21, 5))
    axis.margins(y=0.25)
    axis.legend(fontsize=8, loc="upper right", ncols=2, frameon=False)
    _quiet(axis)


def margins_figure(response: Response, regulator: PI, found: Margins) -> Figure:
    open_loop = loop(response, regulator)
    late = loop(replace(response, delay=response.delay + LATE), regulator)
    answer, late_answer = (
        np.array([system(np.exp(1j * w)) for w in OMEGA], complex) for system in (open_loop, late)
    )
    figure = Figure(figsize=(11.5, 4.6), layout="constrained")
    grid = figure.add_gridspec(2, 3, width_ratios=(1.15, 1, 1))
    magnitude = figure.add_subplot(grid[0, 0])
    phase = figure.add_subplot(grid[1, 0], sharex=magnitude)
    _bode(magnitude, phase, answer, found)
    _nyquist(figure.add_subplot(grid[:, 1]), answer, late_answer, found)
    _root_locus(figure.add_subplot(grid[:, 2]), open_loop, late)
    return figure


def _bode(magnitude: Axes, phase: Axes, answer: NDArray[np.complex128], found: Margins) -> None:
    decibel, degrees = 20 * np.log10(np.abs(answer)), np.degrees(np.unwrap(np.angle(answer)))
    crossing = float(OMEGA[np.argmin(np.abs(degrees + 180))])
    depth = 20 * np.log10(found.gain)
    magnitude.semilogx(OMEGA, decibel, color=BLUE)
    magnitude.axhline(0, color=GREY, lw=0.8)
    magnitude.plot([crossing] * 2, [-depth, 0], color=RED, lw=2)
    magnitude.annotate(
        f"gain margin\n{depth:.1f} dB (× {found.gain:.1f})", (crossing, 0), (-2, 4),
        textcoords="offset points", ha="right", va="bottom", fontsize=8, color=RED,
    )  # fmt: skip
    magnitude.set_ylabel("|L|, dB")
    magnitude.set_title("Bode", fontsize=10)
    magnitude.tick_params(labelbottom=False)
    phase.semilogx(OMEGA, degrees, color=BLUE)
    phase.axhline(-180, color=GREY, lw=0.8, ls="--")
    phase.plot([found.crossover] * 2, [-180, found.phase - 180], color=GREEN, lw=2)
    phase.annotate(
        f"phase margin {found.phase:.0f}°\nat {found.crossover:.2f} rad/update\n"
        f"(= {found.delay:.1f} updates of delay)", (found.crossover, -140), (-8, 0),
        textcoords="offset points", ha="right", va="center", fontsize=8, color=GREEN,
    )  # fmt: skip
    phase.text(0.011, -178, "−180°: stability limit", fontsize=7, color=GREY, va="bottom")
    phase.set_ylabel("phase of L, degrees")
    phase.set_ylim(-195, -80)
    phase.set_yticks([-180, -150, -120, -90])
    phase.set_xlabel("frequency, rad/update (Nyquist: π)")
    for axis in (magnitude, phase):
        axis.axvline(np.pi, color=GREY, lw=0.8, ls=":")
        _quiet(axis)


def _nyquist(
    axis: Axes, answer: NDArray[np.complex128], late: NDArray[np.complex128], found: Margins
) -> None:
    circle = np.exp(1j * np.linspace(0, 2 * np.pi, 300))
    axis.plot(np.real(circle), np.imag(circle), color=GREY, lw=0.8, ls="--")
    axis.plot(answer.real, answer.imag, color=BLUE, label="L, ω > 0")
    axis.plot(answer.real, -answer.imag, color=BLUE, lw=0.8, ls=":", label="ω < 0")
    axis.plot(late.real, late.imag, color=ORANGE, lw=1, ls="--", label=f"{LATE} updates late")
    nearest = np.abs(1 + answer).min()
    angle = np.radians(np.linspace(180, 180 + found.phase, 60))
    axis.plot(0.6 * np.cos(angle), 0.6 * np.sin(angle), color=GREEN, lw=1.5)
    there = np.exp(1j * np.radians(found.phase - 180))
    axis.plot([0, there.real], [0, there.imag], color=GREEN, lw=0.8)
    axis.text(-0.5, -0.6, f"{found.phase:.0f}°", color=GREEN, fontsize=8, ha="center")
    axis.plot([-1], [0], "+", color=RED, ms=11, mew=2)
    axis.annotate("−1: stability limit", (-1, 0), (-1.55, 0.12), fontsize=8, color=RED)
    axis.plot([-1 / found.gain], [0], "o", color=RED, ms=4)
    axis.annotate(
        f"−1/{found.gain:.1f}", (-1 / found.gain, 0), (0.25, -0.45), fontsize=8, color=RED,
        arrowprops={"arrowstyle": "-", "color": RED, "lw": 0.6},
    )  # fmt: skip
    axis.set_xlim(-1.6, 1.2)
    axis.set_ylim(-2.0, 1.6)
    axis.set_aspect("equal")
    axis.set_title(f"Nyquist: |1 + L| ≥ {nearest:.2f}, so |S| ≤ {1 / nearest:.2f}", fontsize=10)
    axis.set_xlabel("Re L")
    axis.set_ylabel("Im L")
    axis.legend(fontsize=8, loc="lower right", frameon=False)
    _quiet(axis)


def _root_locus(axis: Axes, open_loop: control.TransferFunction, late: control.TransferFunction) -> None:
    circle = np.exp(1j * np.linspace(0, 2 * np.pi, 300))
    axis.plot(np.real(circle), np.imag(circle), color=GREY, lw=1, ls="--")
    axis.text(0, -1.1, "unit circle: stability limit", fontsize=8, color=GREY, ha="center", va="top")
    for system, colour, name in ((open_loop, BLUE, "as designed"), (late, ORANGE, f"{LATE} updates late")):
        poles = np.array([_poles(system, f) for f in np.geomspace(1e-2, 40, 3000)])
        inside = np.abs(poles) < OUTSIDE
        axis.plot(
            np.real(poles)[inside], np.imag(poles)[inside], ".", color=colour, ms=1.5
        )  # fmt: skip
        axis.plot([], [], color=colour, lw=2, label=f"{name}, gain × 0.01 to × 40")
        for factor, marker in ((1.0, "o"), (2.0, "s")):
            there = _poles(system, factor)
            label = f"gain × {factor:.0f}" if system is open_loop else None
            axis.plot(
                np.real(there), np.imag(there), marker, color=colour, ms=6, mfc="none", mew=1.4, label=label
            )
    start = np.asarray(control.poles(open_loop), complex)
    axis.plot(np.real(start), np.imag(start), "x", color="black", ms=6, label="poles of L")
    axis.set_xlim(-1.5, 1.5)
    axis.set_ylim(-1.4, 2.2)
    axis.set_aspect("equal")
    axis.axhline(0, color=GREY, lw=0.4)
    axis.set_title("Root locus over the loop gain", fontsize=10)
    axis.set_xlabel("Re z")
    axis.set_ylabel("Im z")
    axis.legend(fontsize=7.5, loc="upper right", frameon=False, markerscale=1)
    _quiet(axis)


def _poles(open_loop: control.TransferFunction, factor: float) -> NDArray[np.complex128]:
    return np.asarray(control.poles(control.feedback(factor * open_loop, 1)), complex)


def rivals_figure(response: Response, regulator: PI, found: Rejection, rivals: Sequence[Rival]) -> Figure:
    figure = Figure(figsize=(11.0, 5.8), layout="constrained")
    grid = figure.add_gridspec(len(rivals), 2, width_ratios=(1, 1.5))
    _sensitivities(figure.add_subplot(grid[:, 0]), response, regulator, found)
    first = None
    for row, rival in enumerate(rivals):
        axis = first = figure.add_subplot(grid[row, 1], sharex=first, sharey=first)
        _tracked(axis, rival)
        if row < len(rivals) - 1:
            axis.tick_params(labelbottom=False)
        else:
            axis.set_xlabel("optimizer step")
        if row == len(rivals) // 2:
            axis.set_ylabel("FLOPs in use, % of dense")
        if row == 0:
            axis.set_title(
                "The budget moves to 30 % and to 50 % in the run; masks freeze at 80 %", fontsize=10
            )
            axis.legend(fontsize=8, loc="lower right", ncols=2, frameon=False)
    return figure


def _sensitivities(axis: Axes, response: Response, regulator: PI, found: Rejection) -> None:
    axis.loglog(
        OMEGA, np.abs(predicted_sensitivity(response, regulator, OMEGA)), color=BLUE, label="predicted"
    )
    axis.errorbar(
        found.omega, np.abs(found.measured), 2 * found.noise, fmt="o", color=ORANGE, capsize=3, ms=5,
        label="measured in the run (± 2 standard errors)",
    )  # fmt: skip
    axis.axhline(1, color=GREY, lw=0.8)
    axis.axhline(2, color=RED, lw=0.8, ls="--")
    axis.text(0.035, 2.05, "|S| = 2: usual limit", fontsize=8, color=RED, va="bottom")
    axis.text(0.035, 1.03, "without feedback", fontsize=8, color=GREY, va="bottom")
    axis.set_xlim(0.03, np.pi)
    axis.set_ylim(0.08, 4)
    axis.set_yticks([0.1, 0.2, 0.5, 1, 2, 4], ["0.1", "0.2", "0.5", "1", "2", "4"])
    axis.set_xlabel("frequency, rad/update")
    axis.set_ylabel("|S|: share of a disturbance that remains")
    axis.set_title("Disturbance rejection", fontsize=10)
    axis.legend(fontsize=8, loc="upper right", frameon=False)
    _quiet(axis)


def _tracked(axis: Axes, rival: Rival) -> None:
    axis.step(rival.step, 100 * rival.reference, where="post", color=RED, lw=1, ls="--", label="asked")
    axis.step(rival.step, 100 * rival.use, where="post", color=BLUE, lw=1.3, label="in use")
    axis.text(
        0.99, 0.9, f"{rival.name}: rms error {100 * rival.rms:.1f} points", transform=axis.transAxes,
        ha="right", va="top", fontsize=9,
    )  # fmt: skip
    axis.set_ylim(20, 105)
    axis.set_xlim(0, rival.step[-1])
    axis.set_yticks([30, 50, 60, 100])
    _quiet(axis)


def _quiet(axis: Axes) -> None:
    axis.grid(True, color="#e6e6e6", lw=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
