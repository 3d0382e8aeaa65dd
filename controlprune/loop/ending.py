"""The end of a run: what `finalize` decides, lays down for good, and has to say.

    finish(run, into)    the last decision, then model and optimizer are plain ones
    Ending               where a run ends otherwise than planned:

    at once    units that `finalize` itself switched off: y₀ -> y₁ of dense, of the resource that fell most
    advised    h = HEALING · n · (y₀ − y₁) / (1 − y₁) more steps of training                 n: total_steps

What only a clock knows is read `READINGS` times before anything is decided, and the decision is made again
with what it then takes, at most `CORRECTIONS` times.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..control.ramp import Plan
from ..policies.base import Decision
from ..structure.groups import widths_of
from ..structure.portable import misfit
from ..structure.saying import warn
from .run import Run

__all__ = ["Ending", "finish"]

log = logging.getLogger("controlprune")
HEALING = 1.0 - Plan().deadline  # the part of a run that the default plan leaves after its cut
CORRECTIONS = 4
READINGS = 2
TOLD = 0.05  # of a limit: a measured use further above it is said
ROUNDING = 1e-9  # of a limit: a counted use further above it is above it


def finish(run: Run, into: nn.Module | None) -> nn.Module:
    """The model, plain and small, or `into` where its parameters are sharded; nothing of ours is left."""
    plant = run.plant
    _require_place(run, into)
    run.checkpoints.require_admitted()
    before, was_compact = plant.masks, plant.compact
    decision = _last_decision(run, before, into)
    if any(bool((was & ~now).any()) for was, now in zip(before, decision.masks, strict=True)):
        use = [run.policy.realised(widths_of(masks)) for masks in (before, decision.masks)]
        log.warning(Ending(run.steps, run.problem.total_steps, run.intake.runs).message(*use))
    if run.policy.ends_in_budget:
        _say_what_is_missed(run, decision)
    run.event = "finalize"
    run.write(decision, before, was_compact)
    small = plant.model if into is None else plant.gathered(into)
    shapes = run.shapes
    for one in (plant, *run.followers):
        one.harden()
    if shapes != run.shapes:
        run.replicas.reshaped()
    run.close(small=into is None)
    return small


def _require_place(run: Run, into: nn.Module | None) -> None:
    """`into` is given where it is needed, and only there, and fits."""
    plant = run.plant
    sharded = plant.group is not None
    if into is None and sharded and not plant.shrinks:
        raise ValueError(
            "into: sharded parameters keep their shapes; give finalize(into=model) a plain dense model "
            "of the same class on every rank, which becomes the small one"
        )
    if into is not None and not sharded:
        raise ValueError("into: only where the parameters are sharded; call finalize()")
    if into is not None and (wrong := misfit(plant.structure, into)):
        raise ValueError(f"into: {wrong}; give a plain dense model of the class that is sharded")


def _last_decision(run: Run, before: tuple[Tensor, ...], into: nn.Module | None) -> Decision:
    """What the policy ends with, laid out; where a clock is under budget, as the clock agrees."""
    gauged = run.metering.senses
    for _ in range(READINGS if gauged else 0):
        run.measure()  # no unit goes, or stays, for one bad measurement
    decision = _final(run, before, into)
    run.relayout(decision.masks, into is None)
    for _ in range(CORRECTIONS if gauged else 0):
        decision = _final(run, before, into)  # what was measured just now counts, both ways
        if all(torch.equal(a, b) for a, b in zip(decision.masks, run.plant.masks, strict=True)):
            break
        run.relayout(decision.masks, True)
    return decision


def _final(run: Run, masks: tuple[Tensor, ...], into: nn.Module | None) -> Decision:
    """From these masks. None of the policy means: as it is."""
    decision = run.decide(replace(run.observation(final=True), masks=masks))
    return Decision(run.plant.masks, into is None) if decision is None else decision


def _say_what_is_missed(run: Run, decision: Decision) -> None:
    """Above its limit: what was counted is the policy's to meet, what was measured is the machine's."""
    use, problem = run.policy.realised(widths_of(decision.masks)), run.problem
    over, beyond = [], []
    for name, limit in problem.budget.items():
        measured = name in problem.measured
        if use[name] > limit * (1.0 + (TOLD if measured else ROUNDING)):
            (over if measured else beyond).append(
                f"{name} is {use[name]:.4g} of dense, {limit:.4g} was asked"
            )
    if beyond:
        warn(
            f"controlprune: finalize: the policy ended above its budget: {'; '.join(beyond)}. Its "
            "decide() is asked once more at the end (observation.final): masks within it must come then",
        )
    if over:
        warn(
            f"controlprune: finalize: {'; '.join(over)}; no smaller net was found, as measured just now. "
            "Loosen it, or look for what else ran on this machine",
        )


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
