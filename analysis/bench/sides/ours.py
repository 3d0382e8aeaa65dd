"""The controller as its documentation says: attach, one line in the loop, finalize; all on the clock."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import controlprune as cp

from .side import Run, Side

__all__ = ["Ours", "Taught"]


class Ours(Side):
    """`settings` of `cp.Control`; none: the default policy."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def begin(self, run: Run) -> None:
        super().begin(run)
        self.controller = cp.attach(
            run.model,
            run.optimizer,
            budget=cp.Budget(flops=run.budget),
            example_inputs=run.example,
            total_steps=run.steps,
            seed=run.seed,
            policy=cp.Control(**self.settings) if self.settings else None,
        )
        self._share, self._held, self._work = 1.0, None, self.controller.plant.structure.work

    def after(self, step: int, loss: Tensor) -> None:
        self.controller.step(loss)

    @property
    def share(self) -> float:
        """Of the tensors: units that are off but still in them cost what they cost."""
        history = self.controller.history
        if not len(history):
            return 1.0
        held = history[-1].widths
        if held != self._held:
            self._held, self._share = held, _share(self._work, held)
        return self._share

    def finish(self) -> nn.Module:
        small = self.controller.finalize()
        history = self.controller.history
        self.run.notes |= {
            "overhead": self.controller.overhead_seconds,
            "units": list(history[-1].active),
            "switches": sum(sum(record.off) + sum(record.on) for record in history),
        }
        return small


class Taught(Ours):
    """With the run's own dense ancestor as a teacher; a forward of it is a third of a dense step."""

    def begin(self, run: Run) -> None:
        super().begin(run)
        self.teacher = cp.ancestor(self.controller)

    def loss(self, model: nn.Module, batch: Any, step: int) -> Tensor:
        logits, labels = self.run.task.outputs(model, batch)
        taught = self.run.task.outputs(self.teacher, batch)[0] if self.teacher.ready else None
        return cp.distillation(logits, taught, labels)

    @property
    def step_share(self) -> float:
        return self.share + (1 / 3 if self.teacher.ready else 0.0)


def _share(work: Any, widths: tuple[int, ...]) -> float:
    from controlprune.structure.extents import size

    def total(n: tuple[int, ...] | None) -> float:
        found = 0.0
        for one in work:
            product = float(one.coefficient)
            for factor in one.factors:
                product *= size(factor, n)
            found += product
        return found

    return total(widths) / total(None)
