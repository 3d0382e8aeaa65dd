"""Metering: what the live net and the run really use, as the policy is told it.

    when the tensors have new shapes,   the gauge times the forward pass       {resource: Reading}
    and every `AGAIN` steps
    at every update                     the accounts say what the run spent    [Account]

Among replicas each figure is the mean over the ranks that have it, so that all of them decide on the same
(`agree`: a vector on this rank, NaN where it is not known here -> the mean of it; loop/replicas.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import astuple, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..budget import TOTALS, Budget, Price, Target
from ..cost.flops import flops
from ..cost.forward_time import Gauge, Reading
from ..cost.instruments import Instruments
from ..cost.run_totals import Account, Accounts
from ..cost.survey import Survey
from ..policies.base import Setting

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
        setting: Setting,
        budget: Budget | Price,
        instruments: Instruments,
        gauge: Gauge | None,
        agree: Agree,
    ) -> None:
        self.use = 1.0
        self.gauge = gauge
        self._work, self._whole = flops(setting.structure), setting.flops
        self._sizes = setting.structure.sizes
        self._open = lambda budget: Accounts(
            _run_targets(budget), setting.total_steps, 3.0 * setting.flops, instruments
        )
        self.accounts: Accounts = self._open(budget)
        self._agree = agree
        self._clock = instruments.clock
        self._entered, self._own = 0.0, 0.0  # seconds in the controller since the last step

    def enter(self) -> None:
        """The controller begins to work."""
        self._entered = self._clock()

    def leave(self) -> None:
        """And ends."""
        self._own += self._clock() - self._entered

    def step(self) -> None:
        """A training step is over, the controller at work."""
        self.leave()
        self.accounts.step(self.use, self._own)
        self._own = 0.0
        self.enter()

    def beside(self, live: float = 0.0, dense: float = 0.0) -> None:
        """Forward passes that were not training, of the live and of the dense net."""
        self.accounts.beside(live * self.use + dense)

    def laid_out(self, widths: Widths, model: nn.Module | None) -> dict[str, Reading]:
        """The tensors have these widths now; what the forward of `model` then takes, where it is gauged."""
        self.use = self._work.value(widths) / self._whole
        found = {} if model is None or self.gauge is None else self.gauge.read(model)
        if found:  # all were read in the same forwards
            first = next(iter(found.values()))
            self.beside(live=first.live, dense=first.dense)
        self.accounts.laid_out()
        agreed: dict[str, Reading] = {}
        for name, reading in found.items():
            fraction, spread = self._mean(reading.fraction, reading.spread)
            agreed[name] = replace(reading, fraction=fraction, spread=spread)
        return agreed

    def read(self, setting: Setting, widths: Widths) -> list[Account]:
        """Where the run totals stand."""
        modelled = {name: setting.fraction(name, widths) for name in sorted(setting.totals)}
        if not modelled:
            return []
        known = {account.resource: account for account in self.accounts.read(modelled)}
        nothing = [math.nan] * 4
        rows = [list(astuple(known[name])[1:]) if name in known else nothing for name in modelled]
        agreed = torch.tensor(self._mean(*(x for row in rows for x in row))).view(-1, 4).tolist()
        found = [Account(name, *row) for name, row in zip(modelled, agreed, strict=True)]
        return [account for account in found if not math.isnan(account.spent)]

    def retarget(self, budget: Budget | Price) -> None:
        self.accounts.retarget(_run_targets(budget))

    def restored(self, budget: Budget | Price, state: Mapping[str, Any]) -> Accounts:
        """Accounts as they were saved; nothing here changes until they are put in place."""
        accounts = self._open(budget)
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
    targets = budget.targets() if isinstance(budget, Budget) else {}
    return {name: target for name, target in targets.items() if name in TOTALS}
