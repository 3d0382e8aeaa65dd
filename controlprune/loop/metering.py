"""Metering: what the live net and the run really use, as the policy is told it.

    when the tensors have new shapes,   the gauge times the forward pass
    and every `AGAIN` steps
    at every update                     the accounts say what the run spent

Among replicas each figure is the mean over the ranks that have it, so that all of them decide on the same
(`agree`: a vector on this rank, NaN where it is not known here -> the mean of it; loop/replicas.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor, nn

from ..budget import TOTALS, Budget, Price, Target
from ..cost.flops import flops
from ..cost.forward_time import Gauge
from ..cost.instruments import Instruments
from ..cost.measurement import Measurement
from ..cost.own import Own
from ..cost.problem import Problem
from ..cost.run_totals import Accounts
from ..cost.survey import Survey
from .terms import Terms

__all__ = ["AGAIN", "Metering"]

# steps after which an unchanged layout is measured again: the machine may have changed. The gauge's some 80
# forwards are a hundredth of as many steps.
AGAIN = 2700

Agree = Callable[[Tensor], Tensor]
Widths = tuple[int, ...]


class Metering:
    """The gauge, if there is one, and the accounts of one run. `use`: of a step now, as dense FLOPs = 1."""

    def __init__(
        self,
        terms: Terms,
        instruments: Instruments,
        gauge: Gauge | None,
        agree: Agree,
    ) -> None:
        problem = terms.problem
        self.use = 1.0
        self.gauge = gauge
        self._own = Own(problem.dense, terms.budget)
        self._work, self._whole = flops(problem.structure), problem.flops
        self._sizes = problem.structure.sizes
        self._open = lambda terms: Accounts(
            _run_targets(terms.budget), terms.total_steps, 3.0 * problem.flops, instruments
        )
        self.accounts: Accounts = self._open(terms)
        self._agree = agree
        self._clock = instruments.clock
        self._entered, self._spent = 0.0, 0.0  # seconds in the controller since the last step

    def enter(self) -> None:
        """The controller begins to work."""
        self._entered = self._clock()

    def leave(self) -> None:
        """And ends."""
        self._spent += self._clock() - self._entered

    @property
    def timed(self) -> bool:
        """Must each step be clocked?"""
        return self.accounts.timed

    def passed(self) -> None:
        """A training step is over that needs no clock."""
        self.accounts.step(self.use)

    def step(self) -> None:
        """A training step is over, the controller at work."""
        self.leave()
        self.accounts.step(self.use, self._spent)
        self._spent = 0.0
        self.enter()

    def laid_out(self, widths: Widths, model: nn.Module | None) -> list[Measurement]:
        """The tensors have these widths now; what the forward of `model` then takes, where it is gauged."""
        self.use = self._work.value(widths) / self._whole
        self.accounts.laid_out()
        if model is None:
            return []
        return self._timed(widths, model) + self._owned(widths, model)

    @property
    def senses(self) -> bool:
        """Is anything of the live net measured?"""
        return self.gauge is not None or bool(self._own.sensed)

    def _owned(self, widths: Widths, model: nn.Module) -> list[Measurement]:
        """What the user's own sensors say; how far they err they do not (`Observer.spread` is the least)."""
        found = self._own.read(model)
        agreed = self._mean(*found.values()) if found else []
        return [
            Measurement(n, widths, y, 0.0) for n, y in zip(found, agreed, strict=True) if not math.isnan(y)
        ]

    def _timed(self, widths: Widths, model: nn.Module) -> list[Measurement]:
        if self.gauge is None:
            return []
        reading, names = self.gauge.read(model), self.gauge.resources
        mine = [math.nan] * (1 + len(names))
        if reading is not None:
            self.accounts.beside(reading.live * self.use + reading.dense)
            mine = [reading.spread, *(reading.use[name] for name in names)]
        spread, *use = self._mean(*mine)
        found = zip(names, use, strict=True)
        return [Measurement(name, widths, y, spread) for name, y in found if not math.isnan(y)]

    def read(self, problem: Problem, widths: Widths) -> list[Measurement]:
        """Where the run totals stand."""
        modelled = {name: problem.fraction(name, widths) for name in sorted(problem.totals)}
        if not modelled:
            return []
        known = {found.resource: found for found in self.accounts.read(modelled, widths)}
        nothing = [math.nan] * 4
        rows = [list(astuple(known[name])[2:]) if name in known else nothing for name in modelled]
        agreed = torch.tensor(self._mean(*(x for row in rows for x in row))).view(-1, 4).tolist()
        found = [Measurement(name, widths, *row) for name, row in zip(modelled, agreed, strict=True)]
        return [account for account in found if not math.isnan(account.spent)]

    def retarget(self, terms: Terms) -> None:
        self.accounts.retarget(_run_targets(terms.budget), terms.total_steps)
        self._own = Own(terms.problem.dense, terms.budget)

    def restored(self, terms: Terms, state: Mapping[str, Any]) -> Accounts:
        """Accounts as they were saved; nothing here changes until they are put in place."""
        accounts = self._open(terms)
        accounts.load_state_dict(state)
        return accounts

    def take(self, accounts: Accounts, survey: Survey, widths: Widths) -> None:
        """Go on with these accounts at these widths; a dense forward takes what the survey says."""
        self.accounts, self.use = accounts, self._work.value(widths) / self._whole
        if self.gauge is not None:
            self.gauge.seconds = survey.costs["latency"].value(self._sizes)

    def _mean(self, *values: float) -> list[float]:
        return self._agree(torch.tensor(values, dtype=torch.float64)).tolist()


def _run_targets(budget: Budget | Price) -> dict[str, Target]:
    return {name: target for name, target in budget.targets().items() if name in TOTALS}
