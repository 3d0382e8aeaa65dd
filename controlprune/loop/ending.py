"""What `finalize` has to say of a run that ends otherwise than planned.

    at once    units that `finalize` itself switched off: y₀ -> y₁ of dense, of the resource that fell most
    advised    h = HEALING · n · (y₀ − y₁) / (1 − y₁) more steps of training                 n: total_steps

`HEALING` is the part of a run that the default plan leaves after its cut, which is over half-way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Ending"]

HEALING = 0.5


@dataclass(frozen=True)
class Ending:
    """How far a run had come; `runs`: of its optimizers."""

    steps: int
    total_steps: int
    runs: int

    def message(self, before: Mapping[str, float], after: Mapping[str, float]) -> str:
        """In one sentence or three; `before`, `after`: use of every resource, fractions of dense."""
        fell = {name: before[name] - after[name] for name in after}
        name = max(fell, key=lambda k: fell[k], default="")
        if not name or fell[name] <= 0:
            return "finalize: units were exchanged to end inside the budget"
        cut = f"{name} went from {before[name]:.3g} to {after[name]:.3g} of dense at once"
        heal = round(HEALING * self.total_steps * fell[name] / max(1.0 - after[name], fell[name]))
        return (
            f"finalize: {self._why}: {cut}; about {max(1, heal)} more training steps let it heal{self._hint}"
        )

    @property
    def _why(self) -> str:
        n, runs = self.total_steps, self.runs
        if self.steps == 0:
            return "controller.step() was never called, so nothing was observed"
        if self.steps >= n:
            return "the run ended above the budget"
        early = f"the run ends at step {self.steps} of {n}, before the plan was through"
        if 2 * self.steps <= min(n, runs):
            early += f" (controller.step() was called {self.steps} times in {runs} runs of the optimizer)"
        return early

    @property
    def _hint(self) -> str:
        if self.steps == 0 or 2 * self.steps <= min(self.total_steps, self.runs):
            return ". Call controller.step() after every optimizer.step()"
        if self.steps < self.total_steps:
            return ". Where a run is to end early, set controller.total_steps = … while it still trains"
        return ""
