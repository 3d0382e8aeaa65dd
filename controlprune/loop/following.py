"""Copies of the model that keep its units and its layout: averages of its weights, as in EMA and SWA.

follow(run, copy)     a copy made when dense, or as the model is now: what it lacks of dormant units is
                      filled in from what is parked, then it is laid out as the model is
states(run)           what is parked for each, in the order in which they were given
restore(run, states)  to those that are there; the others wait until they are given
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..plant.base import named_tensors
from ..plant.copies import fill_in
from .run import Run

__all__ = ["follow", "restore", "states"]


def follow(run: Run, model: nn.Module) -> None:
    """From here on `model` is cut, grown and finalized with the run's own."""
    plant = run.plant
    if _is_as_now(run, model):
        fill_in(plant, model)
    follower = run.granularity.plant(model, None, run.problem.structure, plant.park_on)
    if run.awaited:
        follower.load_state_dict(run.awaited[0])
        del run.awaited[0]
    else:
        follower.apply(plant.masks, compact=plant.compact)
    run.followers.append(follower)


def states(run: Run) -> list[Any]:
    return [*(follower.state_dict() for follower in run.followers), *run.awaited]


def restore(run: Run, states: Sequence[Any]) -> None:
    for follower, state in zip(run.followers, states, strict=False):
        follower.load_state_dict(state)
    for follower in run.followers[len(states) :]:
        follower.apply(run.plant.masks, compact=run.plant.compact)
    run.awaited = list(states[len(run.followers) :])


def _is_as_now(run: Run, model: nn.Module) -> bool:
    """Was it copied in the present layout, with units off? ValueError if neither so nor dense."""
    plant = run.plant
    theirs, mine = named_tensors(model), plant.tensors()
    if model is plant.model:
        raise ValueError("model: it is the attached one; give a copy, such as AveragedModel(model).module")
    dense = [s.name for s in plant.spots if s.name not in theirs or theirs[s.name].shape != s.shape]
    if not dense:
        off = any(not bool(mask.all()) for mask in plant.masks)
        return off and not plant.compact and bool(plant.spots) and plant.quiet(model.state_dict(), "")
    wrong = [name for name in mine if name not in theirs or theirs[name].shape != mine[name].shape]
    if not plant.compact or wrong:
        name = (wrong or dense)[0]
        found = f"has shape {tuple(theirs[name].shape)}" if name in theirs else "is missing"
        raise ValueError(
            f"model: its tensor {name!r} {found}, which is neither dense nor as the attached model is now; "
            "give a copy of that, such as AveragedModel(model).module"
        )
    return True
