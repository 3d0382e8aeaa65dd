"""Experiments on the price loop of a real training run; what they are for stands in `closed_loop.py`.

Every run is one of the same net with `Control(invert=False)`. Use and errors are fractions of dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from baselines import controlled, dense, structure_of
from numpy.typing import NDArray
from plant import Fit, Trace, identify, predicted_sensitivity, sensitivity, simulate
from probes import Held, Probed, binary, multisine, probed
from schedules import Schedule, cubic

from controlprune.app.compare import accuracy, train
from controlprune.app.tasks import Task
from controlprune.budget import Budget
from controlprune.control.horizon import Horizon
from controlprune.control.ramp import Plan
from controlprune.cost.flops import flops
from controlprune.loop.history import History
from controlprune.policies.feedback.control import Control
from controlprune.policies.feedback.pricing import LATE, RATE
from controlprune.price.design import Margins, design, margins
from controlprune.price.pi import PI

__all__ = ["Rejection", "Rival", "Step", "Strained", "designed", "identified", "stepped"]
__all__ += ["rejection", "rivals", "strained"]

Array = NDArray[np.float64]
EVERY = 4  # steps between updates
AT_ONCE = Plan(earliest=0.0, latest=0.02, duration=0.03, deadline=0.05)
SETTLED = 0.1  # of the run, from where on the loop is watched
BUDGET = 0.4
UPDATES = 400
HOLD = 6  # updates for which the dither keeps its value
SQUARE, JUMP = 20, 0.4  # updates of each half wave, and the log price it steps by (up and down about zero)
PERIOD, HARMONICS, LOUD = 45, (1, 2, 3, 5, 8, 13, 20), 0.02
MOVES = ((0.0, 0.6), (0.45, 0.3), (0.6, 0.5))  # of the run: the budget from there on


def watched(task: Task, seed: int, regulator: Probed) -> Trace:
    """A run at the budget from early on, never frozen; the rest after `SETTLED`."""
    policy = Control(
        invert=False, regulator=regulator, update_every=EVERY, plan=AT_ONCE, freeze=1.0, shrink=False
    )  # masked, every unit is seen at every update: none is a look
    side, controller = controlled(task, seed, BUDGET, EVERY * UPDATES, policy, round_to=1)
    train([side], EVERY * UPDATES)
    controller.detach()
    rows = list(controller.history)[:-1]  # the last update enforces the budget
    first = int(SETTLED * UPDATES)
    use = np.array([row.realised["flops"] for row in rows])
    reference = np.array([row.reference["flops"] for row in rows])
    price = np.array([u for _, u in regulator.tape[: len(rows)]])
    return Trace(use[first:], reference[first:], price[first:])


def identified(task: Task, seeds: int) -> tuple[Fit, list[Trace]]:
    """The plant, and the runs it was identified and judged on."""
    traces = [watched(task, s, Held(dither=binary(UPDATES, HOLD, JUMP / 2, s))) for s in range(seeds)]
    return identify(traces), traces


def designed(fit: Fit) -> tuple[PI, Margins]:
    found = design(fit.response, delay_margin=LATE)
    return replace(found.regulator, rate=RATE), found.margins


@dataclass(frozen=True)
class Step:
    """The answer to a step of the log price, from the update before it: mean, and standard error."""

    actual: Array
    error: Array
    predicted: Array
    count: int

    @property
    def miss(self) -> float:
        """Root mean square of predicted minus actual, fraction of dense."""
        return float(np.sqrt(np.mean((self.predicted - self.actual) ** 2)))


def stepped(task: Task, seeds: int, fit: Fit) -> dict[str, Step]:
    """Up and down; the loop is open."""
    wave = np.tile(np.repeat([JUMP / 2, -JUMP / 2], SQUARE), 1)
    traces = [watched(task, s, Held(dither=tuple(float(x) for x in wave))) for s in range(seeds)]
    found = {}
    for name, sign in (("up", 1.0), ("down", -1.0)):
        pieces = [p for trace in traces for p in _pieces(trace, sign)]
        actual = np.array(pieces)
        before = np.full(SQUARE + 1, -sign * JUMP / 2)
        before[1:] *= -1.0
        rest = fit.response.gain * sign * JUMP / 2  # the deviation at rest before the step
        moved = simulate(fit, before, rest)
        predicted = moved - moved[0]
        mean = actual.mean(axis=0)
        spread = actual.std(axis=0, ddof=1) / np.sqrt(len(actual))
        found[name] = Step(mean, spread, predicted, len(actual))
    return found


def _pieces(trace: Trace, sign: float) -> list[Array]:
    """y from the update before each step of that sign, less y there."""
    jumps = np.flatnonzero(np.sign(np.diff(trace.log_price)) == sign)
    whole = [t for t in jumps if t + SQUARE < len(trace.use)]
    return [trace.use[t : t + SQUARE + 1] - trace.use[t] for t in whole]


@dataclass(frozen=True)
class Rejection:
    omega: Array  # radians per update
    measured: NDArray[np.complex128]  # mean over seeds
    noise: Array
    predicted: NDArray[np.complex128]


def rejection(task: Task, seeds: int, fit: Fit, regulator: PI) -> Rejection:
    wave = multisine(PERIOD, HARMONICS, LOUD)
    found, noise = [], []
    for seed in range(seeds):
        probe = probed(regulator, disturbance=wave)
        trace = watched(task, seed, probe)
        count = len(trace.use) // PERIOD
        first = len(trace.use) - count * PERIOD
        began = int(SETTLED * UPDATES) + first  # updates before: the wave is that far
        rolled = np.roll(wave, -(began % PERIOD))
        s, n = sensitivity((trace.use - trace.reference)[first:], tuple(rolled), HARMONICS)
        found.append(s)
        noise.append(n)
    omega = 2 * np.pi * np.array(HARMONICS) / PERIOD
    mean = np.mean(found, axis=0)
    return Rejection(
        omega,
        mean,
        np.sqrt(np.mean(np.square(noise), axis=0) / seeds),
        predicted_sensitivity(fit.response, regulator, omega),
    )


# --- robustness and rivals ------------------------------------------------------------------------


@dataclass(frozen=True)
class Strained:
    """The designed loop with more gain or more delay than it was designed for."""

    name: str
    margins: Margins
    rms: float  # of y − r, mean over seeds, fraction of dense
    largest: float
    changes: float  # of the error's sign, per update


def strained(task: Task, seeds: int, fit: Fit, regulator: PI) -> list[Strained]:
    found = []
    for factor, delay in ((1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (1, 5), (1, 10), (2, 5)):
        more = replace(
            regulator, integral=factor * regulator.integral, proportional=factor * regulator.proportional
        )
        later = replace(fit.response, delay=fit.response.delay + delay)
        errors = []
        for seed in range(seeds):
            trace = watched(task, seed, probed(more, delay=delay))
            errors.append(trace.use - trace.reference)
        found.append(
            Strained(
                f"{factor} × gain" + (f", {delay} updates late" if delay else ""),
                margins(later, more),
                float(np.mean([np.sqrt(np.mean(e**2)) for e in errors])),
                float(np.max(np.abs(errors))),
                float(np.mean([np.mean(e[1:] * e[:-1] < 0) for e in errors])),
            )
        )
    return found


@dataclass(frozen=True)
class Rival:
    """One way to control, on several seeds; arrays over updates are those of the first seed."""

    name: str
    step: Array
    use: Array
    reference: Array
    rms: float  # of y − r once the plan has ended and until the masks freeze, mean over seeds
    end: tuple[float, float]  # least and most
    accuracy: float  # mean, per cent


def rivals(task: Task, seeds: int, fit: Fit, regulator: PI) -> list[Rival]:
    plan = Plan(earliest=0.05, latest=0.05, duration=0.2, deadline=0.3)
    steered = Control(invert=False, plan=plan, update_every=EVERY, freeze=0.8)
    policies = {
        "PI": replace(steered, regulator=regulator),
        "MPC, inverted": replace(steered, invert=True, plan=Horizon(earliest=0.05, deadline=0.3)),
        "feed-forward": replace(steered, regulator=Held()),
    }
    found = [_rival(name, [_moved(task, s, p) for s in range(seeds)]) for name, p in policies.items()]
    return [*found, _rival("open-loop cubic", [_cubic(task, s) for s in range(seeds)])]


Outcome = tuple[Array, Array, Array, float, float]  # step, use, reference, end, accuracy


def _moved(task: Task, seed: int, policy: Control) -> Outcome:
    steps = EVERY * UPDATES
    side, controller = controlled(task, seed, MOVES[0][1], steps, policy, round_to=1)
    for (_, budget), (until, _) in zip(MOVES, (*MOVES[1:], (1.0, 0.0)), strict=True):
        controller.budget = Budget(flops=budget)
        train([side], round(until * steps) - side.steps)
    step, use, reference = _columns(controller.history)
    controller.finalize()
    end = controller.history[-1].realised["flops"]
    return step, use, reference, end, 100 * accuracy(side.model, *task.test)


def _columns(history: History) -> tuple[Array, Array, Array]:
    rows = list(history)
    values = [[row.step, row.realised["flops"], row.reference["flops"]] for row in rows]
    step, use, reference = np.array(values, float).T
    return step, use, reference


def _cubic(task: Task, seed: int) -> Outcome:
    """Planned before the run for the budget of its beginning."""
    steps, structure = EVERY * UPDATES, structure_of(task)
    cuts = cubic(structure, MOVES[0][1], round(0.05 * steps), round(0.3 * steps), EVERY)
    side = dense(task, seed)
    schedule = Schedule(side, structure, cuts)
    side.after = schedule
    train([side], steps)
    schedule.finish()
    step = np.arange(EVERY, steps + 1, EVERY, dtype=float)
    cost = flops(structure)
    widths = [next((cuts[c] for c in sorted(cuts, reverse=True) if c <= t), structure.sizes) for t in step]
    use = np.array([cost.value(w) for w in widths]) / cost.value(structure.sizes)
    budget = np.array([[b for at, b in MOVES if at * steps < t][-1] for t in step])
    return step, use, budget, float(use[-1]), 100 * accuracy(side.model, *task.test)


def _rival(name: str, runs: Sequence[Outcome]) -> Rival:
    errors = []
    for step, use, reference, _, _ in runs:
        watched = (step > 0.3 * step[-1]) & (step < 0.8 * step[-1])
        errors.append(np.sqrt(np.mean((use - reference)[watched] ** 2)))
    ends = [end for *_, end, _ in runs]
    step, use, reference, _, _ = runs[0]
    return Rival(
        name,
        step,
        use,
        reference,
        float(np.mean(errors)),
        (min(ends), max(ends)),
        float(np.mean([correct for *_, correct in runs])),
    )
