"""One run on several ranks: how it begins together, keeps step, and is brought back together.

Every rank decides for itself from the same statistics (means over ranks, `loop/replicas.py`), so masks need
no exchange. That they are the same is checked at every exchange by a digest of all that decides. Where it
differs, or where a rank ran out of data, all go on from one rank's model, optimizer and controller.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..structure.saying import warn
from .replicas import digest, unwrapped

if TYPE_CHECKING:
    from .run import Run

__all__ = ["fingerprint", "rejoin", "repair", "replicate", "step_absent"]


def fingerprint(run: Run) -> list[int]:
    """Of all that decides: it is the same on every rank."""
    if run.replicas.alone:
        return []
    found = [list(run.plant.masks), run.plant.compact, list(run.plant.mark), run.policy.state_dict()]
    return digest([run.steps, run.survey.mark, *found])


def replicate(run: Run, ddp: nn.Module) -> None:
    """`ddp` is DistributedDataParallel around the model: its ranks decide together from here on.

    Called by `attach` when it is given the wrapper, and by the run itself at the wrapper's first forward.
    """
    inner, wrapper = unwrapped(ddp)
    if wrapper is None:
        raise TypeError(f"ddp={type(ddp).__name__}: give the DistributedDataParallel around the model")
    if not any(module is run.model for module in inner.modules()):
        raise ValueError("ddp: it wraps another model than the one that is attached")
    run.replicas.meet(wrapper, run)
    run.plant.read_later(run.replicas.when_reduced)
    run.replicas.mean([], fingerprint(run))
    if run.replicas.agree:
        run.replicas.reshaped()
    else:  # seeds that differ, say
        _take_over(run, 0)


def step_absent(run: Run) -> None:
    """The other ranks made a step, this one has run out of data (`join`)."""
    run.steps += 1
    run.metering.step()
    run.replicas.behind += 1
    run.intake.without_data()
    if run.due:
        parts = [torch.zeros_like(part) for part in run.intake.unread()[:2]]
        run.replicas.mean(parts, fingerprint(run), present=False)
        run.intake.clear()
        run.postponed = True
    run.expect()


def rejoin(run: Run, source: int) -> None:
    """The end of `join`: if a rank ran out of data before the others, all go on from rank `source`."""
    if float(run.replicas.total(torch.tensor([float(run.replicas.behind)]))) > 0:
        _take_over(run, source)
    run.replicas.behind = 0


def repair(run: Run) -> None:
    """The ranks do not agree: all go on from rank 0, or, where they hold shards, an error."""
    if run.plant.group is not None:
        raise RuntimeError(
            f"step {run.steps}: the ranks that hold the shards do not agree on masks or statistics; "
            "start again from the last checkpoint"
        )
    run.replicas.repairs += 1
    warn(
        f"controlprune: at step {run.steps} the replicas did not agree on masks or statistics; all "
        "of them go on from rank 0's model, optimizer and controller",
    )
    _take_over(run, 0)
    run.event = "repair"


def _take_over(run: Run, source: int) -> None:
    """Model, optimizer and controller as they are on rank `source`."""
    parts = [part for part in (run, run.model, run.plant.optimizer) if part is not None]
    mine = run.replicas.rank == source
    states = run.replicas.broadcast([p.state_dict() for p in parts] if mine else None, source)
    if not mine:
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
    run.replicas.reshaped()
