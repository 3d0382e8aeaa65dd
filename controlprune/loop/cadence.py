"""How calls of `controller.step` and runs of the optimizer follow each other, and what is wrong if not.

    n     calls between two runs of the optimizer: 1 in an ordinary loop, N where gradients of N batches are
          accumulated and `step` is called for each
    n̂     the most frequent n so far; a run that came after n > n̂ calls was skipped n − n̂ times (GradScaler)

A loop in which the controller can do nothing is said aloud once per streak, with the likely cause: another
optimizer steps the model (at once), the optimizer does not run, it runs without gradients.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..plant.hooks import Link
from ..plant.joint import inside
from ..structure.saying import warn

__all__ = ["Cadence", "Strangers"]

REPEATED = 10  # runs in a row of which nothing was seen, or that did not come
FIRST = 64  # calls in which the optimizer should have run once, where batches may be accumulated


class Cadence:
    """Counts, for one run of training."""

    def __init__(self) -> None:
        self.gaps: Counter[int] = Counter()  # n -> how often
        self.idle = 0  # calls since the optimizer last ran
        self.blind = 0  # runs in a row without gradients

    def call(self, *, ran: bool, gradients: bool) -> None:
        """`step` is called; did the optimizer run since the last call, and had it gradients?"""
        self.idle += 1
        if ran:
            self.gaps[self.idle] += 1
            self.idle = 0
            self.blind = 0 if gradients else self.blind + 1

    def regular(self) -> bool:
        """Is this call of `step` one more after one run each? Then it is counted; there is no trouble."""
        if self.idle or len(self.gaps) != 1 or 1 not in self.gaps:
            return False
        self.gaps[1] += 1
        self.blind = 0
        return True

    @property
    def usual(self) -> int:
        """n̂; the smaller one of two as frequent."""
        return min(self.gaps, key=lambda n: (-self.gaps[n], n), default=1)

    @property
    def even(self) -> bool:
        """Did the optimizer run at every call? Else gradients of several are accumulated."""
        return self.gaps.keys() == {1} and self.idle == 0

    @property
    def skipped(self) -> int:
        """Calls before which the optimizer should have run and did not."""
        usual = self.usual
        late = sum(times * max(0, n - usual) for n, times in self.gaps.items())
        return late + max(0, self.idle - usual + 1 if self.gaps else self.idle)

    def trouble(self, total_steps: int) -> str:
        """Why nothing is observed, if it is time to say so."""
        if self.blind == REPEATED:
            return (
                f"in {REPEATED} runs of the optimizer no parameter of the prunable layers had a gradient: "
                "call loss.backward() before optimizer.step(), zero_grad() after it, and train the model "
                "that is attached"
            )
        if not self.gaps and self.idle == max(1, min(FIRST, total_steps // 2)):
            return (
                f"the optimizer that is attached has not run in {self.idle} calls of controller.step(): is "
                "another one stepped, is its step() after the whole loop, or are more batches than that "
                "accumulated? Then call controller.step() once per optimizer.step()"
            )
        if self.idle >= REPEATED and self.gaps and self.idle == REPEATED * self.usual:
            return (
                f"the optimizer that is attached has not run in the last {self.idle} calls of "
                "controller.step(): a GradScaler may skip it (its gradients overflow), or another one is "
                "stepped now"
            )
        return ""

    def state_dict(self) -> dict[str, Any]:
        return {"gaps": sorted(self.gaps.items()), "idle": self.idle, "blind": self.blind}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gaps = Counter({int(n): int(times) for n, times in state["gaps"]})
        self.idle, self.blind = int(state["idle"]), int(state["blind"])


class Strangers:
    """Optimizers that were not given to `attach` and step parameters of its model: each is said once."""

    def __init__(self, own: Iterable[Optimizer], parameters: Collection[Tensor]) -> None:
        self.own = {id(optimizer): optimizer for optimizer in own}
        self.parameters = {id(p) for p in parameters}
        self.known: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self.handle = register_optimizer_step_pre_hook(Link(self, Strangers._look))

    def remove(self) -> None:
        self.handle.remove()

    def _look(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if id(optimizer) in self.own or optimizer in self.known:
            return
        self.known.add(optimizer)
        held = sum(id(p) in self.parameters for group in optimizer.param_groups for p in group["params"])
        if not held or any(o is part for o in self.own.values() for part in inside(optimizer)):
            return
        mine = ", ".join(type(o).__name__ for o in self.own.values())
        warn(
            f"controlprune: a {type(optimizer).__name__} that the controller does not know steps {held} "
            f"parameters of this model (it is attached to {mine}): what it does is not observed, and its "
            "state cannot follow a shrink. Was the optimizer made anew? Give all that step the model: "
            "controller.detach(), then attach(model, [optimizer, …])",
        )
