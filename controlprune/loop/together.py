"""One run on several ranks: how it begins together, keeps step, and is brought back together.

Every rank decides for itself from the same statistics (means over ranks, `loop/replicas.py`), so masks need
no exchange. That they are the same is checked at every exchange by a digest of all that decides. Where it
differs, or where a rank ran out of data, all go on from one rank's model, optimizer and controller.
"""

from __future__ import annotations

import torch
from torch import nn

from ..structure.saying import warn
from .replicas import unwrapped
from .run import Run
from .saved import restore, state_of

__all__ = ["Together"]


class Together:
    """What a run does when its replicas (`Follower`) call. They do not keep it: the controller does."""

    def __init__(self, run: Run) -> None:
        self.run = run
        run.replicas.followed_by(self)
        run.replicas.watch_for_ddp(run.plant.model)

    def replicate(self, ddp: nn.Module) -> None:
        """`ddp` is DistributedDataParallel around the model: its ranks decide together from here on.

        Called by `attach` when it is given the wrapper, and by the replicas at the wrapper's first forward.
        """
        run = self.run
        inner, wrapper = unwrapped(ddp)
        if wrapper is None:
            raise TypeError(f"ddp={type(ddp).__name__}: give the DistributedDataParallel around the model")
        if not any(module is run.plant.model for module in inner.modules()):
            raise ValueError("ddp: it wraps another model than the one that is attached")
        run.replicas.meet(wrapper)
        run.plant.read_later(run.replicas.when_reduced)
        run.replicas.mean([], run.fingerprint())
        if run.replicas.agree:
            run.replicas.reshaped()
        else:  # seeds that differ, say
            self._take_over(0)

    def step_absent(self) -> None:
        """The other ranks made a step, this one has run out of data (`join`)."""
        run = self.run
        run.steps += 1
        run.metering.step()
        run.replicas.behind += 1
        run.intake.without_data()
        if run.due:
            parts = [torch.zeros_like(part) for part in run.intake.unread()[:2]]
            run.replicas.mean(parts, run.fingerprint(), present=False)
            run.intake.clear()
            run.postponed = True
        run.expect()

    def rejoin(self, source: int) -> None:
        """The end of `join`: if a rank ran out of data before the others, all go on from rank `source`."""
        replicas = self.run.replicas
        if float(replicas.total(torch.tensor([float(replicas.behind)]))) > 0:
            self._take_over(source)
        replicas.behind = 0

    def repair(self) -> None:
        """The ranks do not agree: all go on from rank 0, or, where they hold shards, an error."""
        run = self.run
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
        self._take_over(0)
        run.event = "repair"

    def _take_over(self, source: int) -> None:
        """Model, optimizer and controller as they are on rank `source`."""
        run = self.run
        parts = [part for part in (run.plant.model, run.plant.optimizer) if part is not None]
        mine = run.replicas.rank == source
        states = run.replicas.broadcast(
            [state_of(run), *(part.state_dict() for part in parts)] if mine else None, source
        )
        if not mine:
            restore(run, states[0])
            for part, state in zip(parts, states[1:], strict=True):
                part.load_state_dict(state)
        run.replicas.reshaped()
