"""The price loop on a real run: does the regulator track, and is the margin real?

    python analysis/closed_loop.py [--budget 0.4] [--seeds 3]

The digits MLP is trained with `Control(invert=False)`: the masks answer the price alone, and the PI regulator
moves the price by the error of the *realised* FLOPs against the reference. The design (regulators/design.py)
is for a response whose gain is taken as 0.3; here the loop gain is multiplied by 1/4, 1, 2, 4 and 8. Shown:
root mean square and largest error once the reference has reached the budget and until the masks freeze,
sign changes of the error (a loop near its margin oscillates), the end before and after `finalize`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import numpy as np
import torch
from baselines import controlled

from controlprune.compare import train
from controlprune.policies.control import Control
from controlprune.regulators.design import design, margins
from controlprune.regulators.identify import Response
from controlprune.report import results_table
from controlprune.tasks import load

FACTORS = (0.25, 1.0, 2.0, 4.0, 8.0)
STEPS = 600


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--budget", type=float, default=0.4)
    options.add_argument("--seeds", type=int, default=3)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    response = Response(gain=0.3)
    regulator = design(response).regulator
    lines = []
    for factor in FACTORS:
        scaled = replace(regulator, integral=factor * regulator.integral)
        policy = Control(invert=False, regulator=scaled, update_every=4)
        rows = np.array([_run(policy, chosen.budget, seed) for seed in range(chosen.seeds)])
        margin = margins(response, scaled)
        lines.append(
            {
                "gain": f"{factor:g} ×",
                "margin (designed)": f"{margin.gain:.2f}",
                "rms error": f"{rows[:, 0].mean():.3f}",
                "largest": f"{rows[:, 1].max():.3f}",
                "sign changes": f"{rows[:, 2].mean():.1f}",
                "before finalize": f"{rows[:, 3].mean():.3f}",
                "after": f"{rows[:, 4].mean():.3f}",
            }
        )
    print(results_table(lines))
    return 0


def _run(policy: Control, budget: float, seed: int) -> tuple[float, ...]:
    side, controller = controlled(load("digits-mlp"), seed, budget, STEPS, policy)
    train([side], STEPS)
    controller.finalize()
    rows = [r for r in controller.history if r.step <= policy.freeze * STEPS]
    there = [r for r in rows if r.reference["flops"] <= budget + 1e-9]
    errors = np.array([r.realised["flops"] - r.reference["flops"] for r in there])
    changes = float(np.sum(errors[1:] * errors[:-1] < 0))
    last, end = controller.history[-2], controller.history[-1]
    return (
        float(np.sqrt(np.mean(errors**2))),
        float(np.abs(errors).max()),
        changes,
        last.realised["flops"],
        end.realised["flops"],
    )


if __name__ == "__main__":
    sys.exit(main())
