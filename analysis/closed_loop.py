"""The price loop on a real training run: identified, predicted, disturbed, and beside its rivals.

    python analysis/closed_loop.py [--task digits-mlp] [--data DIR] [--seeds 3] [--out docs]

Everything runs on the same net in training with `Control(invert=False)`: the masks answer the price alone.

    identify     the loop is opened, the price dithered about the feed-forward; a plant is fitted by recursive
                 least squares to the first 60 % of the runs and predicts the rest               (plant.py)
    step         the price is stepped up and down; predicted against actual, mean over steps and seeds
    margins      the PI designed for that plant (regulators/design.py): gain, phase and delay margin
    sensitivity  the measurement is disturbed at seven frequencies at once; S predicted and measured
    strained     the designed loop with its gain multiplied, with measurements that come late, and both
    rivals       the budget moves 0.6, 0.3, 0.5 in the run: PI, the horizon's MPC with exact inversion,
                 feed-forward alone, and cubic gradual pruning by width, which cannot know of it

The experiments are in loop_studies.py, the pictures, which go to `--out`, in loop_figures.py. Widths go in
single units (`round_to=1`). About seven minutes of CPU time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from loop_figures import margins_figure, plant_figure, rivals_figure
from loop_studies import (
    SQUARE,
    Rejection,
    Rival,
    Step,
    Strained,
    designed,
    identified,
    rejection,
    rivals,
    stepped,
    strained,
)
from plant import Fit, Trace

from controlprune.app.report import results_table
from controlprune.app.tasks import load
from controlprune.price.design import Margins
from controlprune.price.pi import PI


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--task", default="digits-mlp")
    options.add_argument("--data", type=Path, default=None, help="folder that holds mnist/, cifar10/")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--out", type=Path, default=Path("docs"))
    chosen = options.parse_args()
    torch.set_num_threads(1)
    task, seeds = load(chosen.task, chosen.data), chosen.seeds

    fit, traces = identified(task, seeds)
    print(f"plant: y' = {fit.a:.3f} y {fit.b:+.3f} u' + c, gain {fit.response.gain:.3f}, delay {fit.delay}\n")
    print(_table(_prediction_rows(fit)))
    steps = stepped(task, seeds, fit)
    for name, step in steps.items():
        rest = slice(SQUARE // 2, None)
        print(
            f"price {name}: {100 * step.actual[rest].mean():+.1f} points at rest, predicted "
            f"{100 * step.predicted[rest].mean():+.1f}; rms error on the way {100 * step.miss:.1f}"
        )
    regulator, found = designed(fit)
    print(
        f"\nPI: K_I = {regulator.integral:.3g}, K_P = {regulator.proportional:.3g}; gain margin "
        f"{20 * np.log10(found.gain):.1f} dB, phase margin {found.phase:.0f}°, delay margin "
        f"{found.delay:.1f} updates\n"
    )
    rejected = rejection(task, seeds, fit, regulator)
    print(_table(_sensitivity_rows(rejected)))
    print(_table(_strained_rows(strained(task, seeds, fit, regulator))))
    others = rivals(task, seeds, fit, regulator)
    print(_table(_rival_rows(others)))
    _draw(chosen.out, fit, traces, steps, regulator, found, rejected, others)
    return 0


def _draw(
    out: Path,
    fit: Fit,
    traces: Sequence[Trace],
    steps: dict[str, Step],
    regulator: PI,
    found: Margins,
    rejected: Rejection,
    others: Sequence[Rival],
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    plant_figure(fit, traces, steps).savefig(out / "loop-plant.png", dpi=110)
    margins_figure(fit.response, regulator, found).savefig(out / "loop-margins.png", dpi=110)
    rivals_figure(fit.response, regulator, rejected, others).savefig(out / "loop-rivals.png", dpi=110)


Rows = list[dict[str, str]]


def _table(rows: Rows) -> str:
    return results_table(rows) + "\n"


def _prediction_rows(fit: Fit) -> Rows:
    names = ("updates ahead", "plant, points", "as it is now", "as on average")
    return [
        dict(zip(names, (str(k), *(f"{100 * e:.1f}" for e in errors)), strict=True))
        for k, errors in fit.errors.items()
    ]


def _sensitivity_rows(found: Rejection) -> Rows:
    return [
        {
            "rad/update": f"{omega:.2f}",
            "|S| predicted": f"{abs(predicted):.2f}",
            "measured": f"{abs(measured):.2f}",
            "± standard error": f"{noise:.2f}",
        }
        for omega, predicted, measured, noise in zip(
            found.omega, found.predicted, found.measured, found.noise, strict=True
        )
    ]


def _strained_rows(runs: Sequence[Strained]) -> Rows:
    return [
        {
            "loop": run.name,
            "gain margin, dB": f"{20 * np.log10(run.margins.gain):.1f}",
            "phase margin": f"{run.margins.phase:.0f}" if run.margins.gain > 1 else "unstable",
            "rms error, points": f"{100 * run.rms:.1f}",
            "largest": f"{100 * run.largest:.1f}",
            "sign changes per update": f"{run.changes:.2f}",
        }
        for run in runs
    ]


def _rival_rows(others: Sequence[Rival]) -> Rows:
    return [
        {
            "way": rival.name,
            "rms error, points": f"{100 * rival.rms:.1f}",
            "end, % of dense": f"{100 * rival.end[0]:.1f} to {100 * rival.end[1]:.1f}",
            "accuracy, %": f"{rival.accuracy:.2f}",
        }
        for rival in others
    ]


if __name__ == "__main__":
    sys.exit(main())
