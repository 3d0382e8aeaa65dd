"""What a policy sees and answers: the interface between the loop and whoever decides.

    begin(problem)       the policy at work on one model
    wants(step)          what it needs of the step that comes: gate gradients? a decision after it?
    sees(observation)    a step is over: its loss, and the gate gradients where they were wanted
    decide(observation)  what the plant is to become; None: as it is
    state_dict()         what it needs to go on as if it had not stopped

All but `decide` have defaults. It is called before the first step (`step` 0), after every step for which a
decision was wanted, and by `finalize` (`final`), where the answer must be within the budget. A policy never
touches the model. All vectors have one entry per unit, the groups one after the other (`problem.split`).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from torch import Tensor

from ..allocate.limits import uniform_under
from ..cost.measurement import Measurement
from ..cost.problem import Problem
from ..plant.base import Kind

__all__ = ["Decision", "Observation", "Policy", "Wants"]

P = TypeVar("P", bound="Policy")
UPDATES = 60  # decisions in a run, where a policy does not say when


@dataclass(frozen=True)
class Wants:
    """What is needed of one step: its `gradients` to be read, a `decision` to be asked for after it.

    `kind`: what of a weight's gradient, where units are weights (plant/base.py).
    """

    gradients: bool = False
    kind: Kind = "gate"
    decision: bool = False


@dataclass(frozen=True)
class Observation:
    """What is known after a step (`sees`), and of the net as it stands (`decide`).

    `step`: how many are done. `loss`: nan where it is not given or no step was good yet. `gradients`: ∂L/∂g
    of every unit, NaN where it is absent; None: not read. In `decide` only: `masks` per group, True = active;
    `compact`, are the others out of the tensors?; `measurements` since the last decision; `final`, the run
    ends with this one. And, computed when called: `weigh`, Σ w² over the columns that read each unit, which
    `norms` has; `shares`, the amplitude of each unit in what is seen of its group (plant/base.py), None: each
    is seen by itself.
    """

    step: int
    loss: float
    gradients: Tensor | None = None
    weigh: Callable[[], Tensor] | None = None
    shares: Callable[[], Tensor | None] | None = None
    masks: tuple[Tensor, ...] = ()
    compact: bool = False
    measurements: tuple[Measurement, ...] = ()
    final: bool = False

    @cached_property
    def norms(self) -> Tensor | None:
        """Read once, as most updates decide without."""
        return None if self.weigh is None else self.weigh()


@dataclass(frozen=True)
class Decision:
    """What the plant is to become, and what that was based on.

    `masks` per group, True = active. `compact`: physically shrunk. For the history: `reference`, what was
    asked of each resource, fraction of dense; `price`, loss per dense use of it; `event`, a word.
    """

    masks: tuple[Tensor, ...]
    compact: bool = True
    reference: Mapping[str, float] = field(default_factory=dict)
    price: Mapping[str, float] = field(default_factory=dict)
    event: str = ""


class Policy(ABC):
    """Override `decide`; the rest as far as it is needed."""

    problem: Problem  # of the model at work on
    ends_in_budget: bool = True  # False: the budget bounds the steps, not what `finalize` gives

    def begin(self: P, problem: Problem) -> P:
        """A policy at work on this problem; `self` stays as the user made it."""
        run = copy.copy(self)
        run.problem = problem
        return run

    def wants(self, step: int) -> Wants:
        """Of step `step`, which comes next."""
        every = max(1, self.problem.total_steps // UPDATES)
        return Wants(gradients=True, decision=step % every == 0)

    def sees(self, observation: Observation) -> None:  # noqa: B027 — a policy may have no memory
        """A step is over and was good."""

    @abstractmethod
    def decide(self, observation: Observation) -> Decision | None:
        """The masks from here on, or None: as they are."""

    def uniform(self) -> tuple[int, ...]:
        """The widths at the same fraction of every group that are just within the budget."""
        return uniform_under(self.problem, self.problem.budget)

    def retarget(self, problem: Problem) -> None:
        """The user changed the budget during the run."""
        self.problem = problem

    def realised(self, widths: tuple[int, ...]) -> dict[str, float]:
        """Use of every budgeted resource at these widths, fractions of dense, as far as it is known."""
        return {name: self.problem.fraction(name, widths) for name in self.problem.costs}

    def describe(self) -> list[str]:
        """Lines for the report."""
        return []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """The reverse; an error if it is not what `state_dict` gave."""
