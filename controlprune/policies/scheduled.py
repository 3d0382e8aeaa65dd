"""Policies on a given schedule: the budget says how many units stay, the plan when, and the rule which.

    level       ℓ(t) from 1 (dense) to 0 (budget), whatever the loss does        (control/ramp.py)
    reference   r_k(t) = β_k + (1 − β_k) ℓ(t)                                    (feedback/reference.py)
    widths      n(t): the uniform allocation under r_k                           (allocate/uniform.py)
    rule        n_g units of every group g, from what is known of its units      (`Rule.choose`)

`Rule` is the settings, `Schedule` any of them at work. Run totals and measured resources are corrected by
what was measured, as for the controller; the plan is hastened where a run total would else need too small an
end.

A rule that exchanges units does so at every update until `exchanges` of the run. If it wants to know the
gradients of dormant units, these are in the tensors, masked, for the `looks` steps before each exchange.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..allocate.erdos_renyi import erk_under
from ..allocate.limits import uniform_under
from ..control.ramp import Plan
from ..control.scale import Observer
from ..cost.problem import Problem
from ..plant.base import Kind
from ..saliency.moments import LossTrend
from ..structure.groups import widths_of
from .base import UPDATES, Decision, Observation, Policy, Wants
from .feedback.reference import Reference

__all__ = ["Rule", "Schedule", "Units", "at_once", "require_share", "require_steps", "top"]

STAGES = 1000  # of the reference: as good as continuous
CALM = LossTrend()  # plans here do not heed the loss


@dataclass(frozen=True)
class Units:
    """One group as a rule sees it; vectors of N_g."""

    on: Tensor  # bool
    norm: Tensor  # Σ w² over the consumers' columns
    gradient: Tensor  # Σ_t of what the rule keeps of ∂L/∂g
    away: Tensor  # exchanges since it was last on
    exchange: bool  # is one due, or do only the widths change?
    progress: float  # t / T
    random: torch.Generator

    def draw(self) -> Tensor:
        """Random numbers in [0, 1), one per unit."""
        return torch.rand(len(self.on), generator=self.random)


@dataclass(frozen=True, kw_only=True)
class Rule(Policy):
    """What all of them share. `layers`: how many units of each group, where they are single weights."""

    shrink: bool = True  # False: masks only
    layers: Literal["uniform", "erk"] = "uniform"  # allocate/uniform.py, allocate/erdos_renyi.py

    @property
    def every(self) -> int | None:
        """Optimizer steps between updates; None: `UPDATES` in a run."""
        return None

    @property
    def kind(self) -> Kind:
        """What it asks of single weights' gradients (plant/base.py)."""
        return "gate"

    @property
    def exchanges(self) -> float:
        """The share of the run until which units are exchanged."""
        return 0.0

    @property
    def looks(self) -> int:
        """Steps in which it sees dormant units before an exchange."""
        return 0

    @abstractmethod
    def plan(self, total_steps: int) -> Plan:
        """When the budget is reached."""

    @abstractmethod
    def choose(self, units: Units, width: int) -> Tensor:
        """`width` units of one group, as a mask."""

    def listens(self, step: int) -> bool:
        """Are the gate gradients of this step wanted, beside those of looks?"""
        return False

    def keep(self, gradients: Tensor) -> Tensor:
        """What is summed up of ∂L/∂g."""
        return gradients

    def widths(self, problem: Problem, allowed: tuple[int, ...]) -> tuple[int, ...]:
        """Where the rule has a say in how many; `allowed` by the budget."""
        return allowed

    def ends_with(self, problem: Problem) -> Decision | None:
        """What `finalize` gives, if it is not the net as it is."""
        return None

    def require(self, problem: Problem) -> None:
        """ValueError if it cannot work on this problem."""
        name = type(self).__name__
        if problem.prices:
            raise ValueError(
                f"budget: cp.{name} follows a limit, not a price; give cp.Budget(...), or policy=cp.Control()"
            )
        if problem.totals and not self.shrink:
            raise ValueError(
                f"policy: {name}(shrink=False) keeps the net dense, so {', '.join(problem.totals)} cannot "
                "fall; leave shrink=True"
            )
        if self.exchanges > 0.0 and not all(group.returns for group in problem.structure.groups):
            raise ValueError(
                f"policy: cp.{name} exchanges units, and states that were cut never come back; give "
                "policy=cp.Control(), cp.Gradual() or cp.Magnitude()"
            )
        if self.layers not in ("uniform", "erk"):
            raise ValueError(f'layers={self.layers!r}: give "uniform" or "erk"')
        if self.layers == "erk" and not problem.structure.entries:
            raise ValueError(
                f'layers="erk": it is about single weights; give granularity="weight", or leave it, {name}()'
            )

    def begin(self, problem: Problem) -> Schedule:
        self.require(problem)
        return Schedule(self, problem)

    def decide(self, observation: Observation) -> Decision | None:
        raise TypeError(f"{type(self).__name__} holds the settings; begin(problem) gives the policy at work")


class Schedule(Policy):
    """One run of a `Rule`."""

    def __init__(self, rule: Rule, problem: Problem) -> None:
        self.rule, self.problem = rule, problem
        self.ends_in_budget = rule.ends_with(problem) is None
        total = problem.total_steps
        self.every = rule.every or max(rule.looks + 1, total // UPDATES)
        plan = rule.plan(total)
        self.turns = plan.latest, plan.deadline  # where the plan wants a decision, shares of the run
        self.reference = Reference(plan, STAGES, Observer(), problem)
        self.random = torch.Generator().manual_seed(problem.seed)
        units = sum(problem.structure.sizes)
        self.gradient = torch.zeros(units)
        self.away = torch.zeros(units, dtype=torch.int32)
        self.next = self.every  # the step of the next exchange
        self.looks_until = 0  # the step that ends a look; 0: there is none

    def wants(self, step: int) -> Wants:
        looks = self._exchanges(self.next) and step == self.next - self.rule.looks
        known = step == 1 and bool(self.problem.totals)  # where they stand is told after a step
        due = step % self.every == 0 or step == self.looks_until or self._turns(step)
        return Wants(
            gradients=self.looks_until > 0 or self.rule.listens(step),
            kind=self.rule.kind,
            decision=due or looks or known,
        )

    def _turns(self, step: int) -> bool:
        total = self.problem.total_steps
        return any(step == math.ceil(share * total - 1e-9) for share in self.turns)

    def sees(self, observation: Observation) -> None:
        if observation.gradients is not None:
            self.gradient += self.rule.keep(observation.gradients.nan_to_num(0.0, 0.0, 0.0))

    def decide(self, observation: Observation) -> Decision | None:
        self.reference.heed(observation.measurements)
        if observation.final:
            return self.rule.ends_with(self.problem) or self._last(observation)
        step, masks = observation.step, observation.masks
        if step < self.looks_until:
            return None
        progress = step / self.problem.total_steps
        self.reference.advance(progress, CALM, 1.0)
        asked = self.reference.asked(progress)
        if self._looks(step, masks):
            self.looks_until = step + self.rule.looks
            self.gradient.zero_()
            return Decision(masks, False, asked, event="look")
        looked, self.looks_until = self.looks_until > 0, 0
        exchange = self._exchanges(step) and (looked or step >= self.next)
        widths = self._widths(asked, masks)
        if exchange or widths != widths_of(masks):
            masks = self._choose(observation, widths, exchange=exchange)
        if exchange:
            self._exchanged(step, torch.cat(masks))
        if step == 0 and widths == self.problem.structure.sizes:
            return None  # it begins dense
        return Decision(masks, self.rule.shrink, asked, event="" if step else "start")

    def _exchanges(self, step: int) -> bool:
        total = self.problem.total_steps  # after the last step nothing would be trained
        return 0 < step <= self.rule.exchanges * total and step < total

    def _looks(self, step: int, masks: tuple[Tensor, ...]) -> bool:
        """Is it time to put dormant units into the tensors, before an exchange?"""
        due = step >= self.next - self.rule.looks and self._exchanges(self.next)
        return self.rule.looks > 0 and self.looks_until == 0 and due and not all(bool(m.all()) for m in masks)

    def _widths(self, asked: Mapping[str, float], masks: tuple[Tensor, ...]) -> tuple[int, ...]:
        held = widths_of(masks)
        if self.reference.feeds_back and not self.reference.moved(asked, held):
            return held
        self.reference.solved(asked)
        return self._under(asked)

    def _under(self, asked: Mapping[str, float]) -> tuple[int, ...]:
        limits = self.reference.modelled(asked)
        allocation = erk_under if self.rule.layers == "erk" else uniform_under
        return self.rule.widths(
            self.problem, allocation(self.problem, limits) or self.problem.structure.sizes
        )

    def _choose(self, seen: Observation, widths: tuple[int, ...], *, exchange: bool) -> tuple[Tensor, ...]:
        assert seen.norms is not None
        sizes, progress = list(self.problem.structure.sizes), seen.step / self.problem.total_steps
        vectors = (seen.norms.split(sizes), self.gradient.split(sizes), self.away.split(sizes))
        return tuple(
            self.rule.choose(Units(on, norm, gradient, away, exchange, progress, self.random), width)
            for on, norm, gradient, away, width in zip(seen.masks, *vectors, widths, strict=True)
        )

    def _exchanged(self, step: int, on: Tensor) -> None:
        self.next = (step // self.every + 1) * self.every
        self.away = torch.where(on, 0, self.away + 1)
        self.gradient = self.gradient.masked_fill(on, 0.0)

    def _last(self, seen: Observation) -> Decision:
        """The present masks if they meet the budget, else as many as it allows."""
        asked, masks = dict(self.problem.budget), seen.masks
        if not self.reference.met(widths_of(masks)):
            masks = self._choose(seen, self._under(asked), exchange=False)
        return Decision(masks, True, asked)

    def realised(self, widths: tuple[int, ...]) -> dict[str, float]:
        return self.reference.realised(widths)

    def retarget(self, problem: Problem) -> None:
        self.rule.require(problem)
        self.problem = problem
        self.reference.retarget(problem)

    def describe(self) -> list[str]:
        return self.reference.describe()

    def state_dict(self) -> dict[str, Any]:
        return {
            "reference": self.reference.state_dict(),
            "gradient": self.gradient.clone(),
            "away": self.away.clone(),
            "random": self.random.get_state(),
            "every": self.every,
            "next": self.next,
            "looks_until": self.looks_until,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reference.load_state_dict(state["reference"])
        self.gradient, self.away = state["gradient"].clone(), state["away"].clone()
        self.random.set_state(state["random"])
        self.every = int(state["every"])
        self.next, self.looks_until = int(state["next"]), int(state["looks_until"])


def at_once(at: float) -> Plan:
    """To the budget in one step when `at` of the run has passed."""
    return Plan(earliest=at, latest=at, deadline=at, duration=0.0, tolerance=math.inf)


def top(score: Tensor, n: int) -> Tensor:
    """The mask of the `n` largest; of equals the first."""
    mask = torch.zeros(len(score), dtype=torch.bool)
    mask[torch.sort(score, descending=True, stable=True).indices[:n]] = True
    return mask


def require_share(name: str, value: object, *, least: float = 0.0) -> None:
    """ValueError unless it is a number from `least` to 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= 1.0:
        raise ValueError(f"{name}={value!r}: give a number from {least:g} to 1")


def require_steps(name: str, value: object) -> None:
    """ValueError unless it is a whole number of steps."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}: give a whole number of steps >= 1")
