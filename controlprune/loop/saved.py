"""A run as plain containers, and back: everything it needs to go on as if it had not stopped.

Nothing of the run is changed before all of a given state was found to fit; checksums and formats are
state/resume.py.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import astuple, replace
from typing import Any

from ..cost.measurement import Measurement
from ..cost.problem import require_steps
from ..cost.survey import Survey
from ..plant.parked import parsed
from ..state.resume import FORMAT, budget_of, plain_budget, require_alike, require_state, signed
from ..structure.surroundings import plainly
from . import following
from .history import History
from .intake import Intake
from .recompile import Layouts
from .run import Run

__all__ = ["restore", "state_of"]


@plainly
def state_of(run: Run) -> dict[str, Any]:
    """A copy, signed."""
    if run.replicas.alone:
        run.read()
    structure = run.problem.structure
    state = {
        "format": FORMAT,
        "policy": type(run.given).__name__,
        "groups": dict(zip(structure.names, structure.sizes, strict=True)),
        "plant": run.plant.state_dict(),
        "loop": run.policy.state_dict(),
        "history": run.history.state_dict(),
        "budget": plain_budget(run.terms.budget),
        "survey": run.terms.survey.state_dict(),
        "accounts": run.metering.accounts.state_dict(),
        "counts": [run.steps, run.measured_at, int(run.postponed)],
        "measurements": [_plain(found) for found in run.measurements],
        "intake": run.intake.state_dict(),
        "loss": run.loss,
        "layouts": run.layouts.state_dict(),
        "seconds": [time.process_time() - run.began, run.overhead],
        "followers": following.states(run),
    }
    return signed(copy.deepcopy(state))


@plainly
def restore(run: Run, state: Mapping[str, Any]) -> None:
    """Go on from `state`, which must come from a run of the same model; ValueError if it does not."""
    require_state(state, run.problem.structure, type(run.given).__name__)
    try:
        state = copy.deepcopy(dict(state))
        terms = replace(
            run.terms,
            budget=budget_of(state["budget"], run.terms.budget.own),
            survey=Survey.of(state["survey"]),
            total_steps=require_steps(state["history"]["total_steps"]),
        )
        problem = terms.problem
        policy = run.given.begin(problem)
        require_alike(policy.state_dict(), state["loop"])
        policy.load_state_dict(state["loop"])
        _blank(run.history).load_state_dict(state["history"])
        accounts = run.metering.restored(terms, state["accounts"])
        require_alike({"counts": [0, 0, 0]}, {"counts": state["counts"]})
        steps, measured_at, postponed = state["counts"]
        seconds, overhead = (float(x) for x in state["seconds"])
        layouts, loss = Layouts.of(state["layouts"]), float(state["loss"])
        measurements = [_measurement(found, len(problem.structure.groups)) for found in state["measurements"]]
        intake = Intake(run.plant)
        intake.load_state_dict(state["intake"])
        followers = list(state.get("followers", ()))
        for follower in followers if run.plant.spots else ():
            parsed(follower, problem.structure, run.plant.spots)
        shapes = run.shapes
        run.checkpoints.set_aside()
        run.plant.load_state_dict(state["plant"])
    except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        run.checkpoints.admit()
        raise ValueError(
            f"state_dict: it is corrupt or of another model ({type(error).__name__}: {error}); nothing "
            "was changed, load one that this package wrote for this model"
        ) from error
    run.checkpoints.admit()
    if shapes != run.shapes:
        run.replicas.reshaped()
    following.restore(run, followers)
    run.policy, run.intake, run.layouts = policy, intake, layouts
    run.terms = terms
    run.metering.take(accounts, terms.survey, run.widths)
    run.history.load_state_dict(state["history"])
    run.steps, run.measured_at, run.loss, run.measurements = steps, measured_at, loss, measurements
    run.postponed = bool(postponed)
    run.overhead, run.began = overhead, time.process_time() - seconds
    run.expect()


def _blank(history: History) -> History:
    return History(history.names, history.sizes, history.budget, history.total_steps)


def _plain(found: Measurement) -> list[Any]:
    name, widths, *numbers = astuple(found)
    return [name, list(widths), *numbers]


def _measurement(saved: Any, groups: int) -> Measurement:
    name, widths, use, spread, spent, limit = saved
    if len(widths) != groups:
        raise ValueError(f"a measurement at {len(widths)} widths where there are {groups} groups")
    return Measurement(
        str(name), tuple(int(n) for n in widths), float(use), float(spread), float(spent), float(limit)
    )
