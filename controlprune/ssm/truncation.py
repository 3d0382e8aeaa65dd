"""Truncation in training: early cuts, each layer by its own Hankel singular values.

    states of a layer ← the fewest that keep (1 − τ) Σ σ         at `cuts` moments in the first `window`

    truncation = Truncation(model, optimizer, total_steps=steps, tolerance=0.02)
    for x, y in loader:
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        truncation.step()                    # the one new line; may cut, between two steps
        optimizer.zero_grad()
    truncation.validated(accuracy)           # optional, whenever you validate: rolls a cut back that hurt

Early, because a state that goes at a tenth of the run costs nothing for the rest of it, and because early and
late cuts were found to end alike (arXiv 2510.02823). A cut that would take less than a twentieth of a layer's
states is left for later: it would save little and disturb the optimizer all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from ..structure.saying import warn
from .gramians import Array
from .snapshot import Snapshot
from .truncate import Cut, states_kept_by, states_of, truncatable, truncate, values_of

__all__ = ["Record", "Truncation"]

WORTH = 0.05  # share of a layer's states that a cut takes at least; the published 5 %


@dataclass(frozen=True, eq=False)
class Record:
    """What was seen, and done, at one step."""

    step: int
    values: Mapping[str, Array]  # Hankel singular values per layer, before the cuts
    states: Mapping[str, int]  # per layer, after the cuts
    cuts: tuple[Cut, ...]
    rolled_back: bool = False


class Truncation:
    """Cuts the states of every state-space layer of `model` while it trains.

    tolerance: share of the sum of a layer's Hankel singular values that its cuts may take, each time.
    states: never fewer than so many per layer; with `tolerance=0`, exactly so many at the end of the window,
        in cuts of one ratio.
    window: the share of `total_steps` in which cuts are made, `cuts` of them, the last one at its end.
    record_every: note the values every so many steps too, for a picture; 0: at the cuts only.
    allowed: how much the validated score may fall below that before a cut; else it is rolled back.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        *,
        total_steps: int,
        tolerance: float = 0.02,
        states: int | Mapping[str, int] = 1,
        window: float = 0.1,
        cuts: int = 5,
        record_every: int = 0,
        allowed: float | None = None,
    ) -> None:
        self.layers = truncatable(model)
        if not self.layers:
            raise ValueError("model: no layer of it gives system() and parameters_for(); see ssm.StateSpace")
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance={tolerance}: give a share of Σ σ in [0, 1)")
        if not 0 < window <= 1:
            raise ValueError(f"window={window}: give a share of total_steps in (0, 1]")
        if not 1 <= cuts <= window * total_steps:
            raise ValueError(f"cuts={cuts}: give 1 to {int(window * total_steps)}, the steps of the window")
        self.model, self.optimizer = model, optimizer
        self.tolerance, self.allowed = tolerance, allowed
        self.record_every = record_every
        self.least = dict.fromkeys(self.layers, states) if isinstance(states, int) else dict(states)
        if unknown := self.least.keys() - self.layers.keys():
            raise ValueError(f"states: no state-space layer is called {sorted(unknown)[0]!r}")
        self.moments = frozenset(round(window * total_steps * (i + 1) / cuts) for i in range(cuts))
        self.steps = 0
        self.history: list[Record] = []
        self._score: float | None = None
        self._before: Snapshot | None = None
        self._stopped = False

    def step(self) -> tuple[Cut, ...]:
        """After the optimizer's step; cuts, if this is a moment to, and says what it cut."""
        self.steps += 1
        if self.steps in self.moments and not self._stopped:
            return self.cut()
        if self.record_every and self.steps % self.record_every == 0:
            self._record(self._values())
        return ()

    def cut(self) -> tuple[Cut, ...]:
        """Truncate now, whatever the schedule says."""
        try:
            values = self._values()
        except ValueError as error:
            self._stopped = True
            warn(f"no states are cut any more, the training goes on: {error}")
            return ()
        wanted = {name: self._wanted(name, layer) for name, layer in self.layers.items()}
        if self.allowed is not None and any(wanted.values()):
            self._before = Snapshot(self.model, self.optimizer)
        done = tuple(
            truncate(self.layers[name], states, self.optimizer, name)
            for name, states in wanted.items()
            if states
        )
        self._record(values, done)
        return done

    @property
    def states(self) -> dict[str, int]:
        """How many states each layer has now."""
        return {name: states_of(layer) for name, layer in self.layers.items()}

    def validated(self, score: float) -> bool:
        """The score (higher is better) as just validated; True if it fell and the last cuts were rolled back.

        The first one is what later ones are compared with, so validate once before the first cut. A roll-back
        brings back everything as it was before the last cuts, and there are no others.
        """
        if self._before is None or self._score is None:
            self._score = score
            return False
        assert self.allowed is not None
        fell = score < self._score - self.allowed
        if fell:
            self._before.restore()
            self._stopped = True
            self._record(self._values(), rolled_back=True)
        else:
            self._score = score
        self._before = None
        return fell

    def _values(self) -> dict[str, Array]:
        return {name: values_of(layer) for name, layer in self.layers.items()}

    def _record(
        self, values: Mapping[str, Array], cuts: tuple[Cut, ...] = (), rolled_back: bool = False
    ) -> None:
        self.history.append(Record(self.steps, values, self.states, cuts, rolled_back))

    def _wanted(self, name: str, layer: nn.Module) -> int:
        """The number of states to cut to; 0: not now."""
        now, least = states_of(layer), self.least.get(name, 1)
        left = sum(moment >= self.steps for moment in self.moments)
        if self.tolerance:
            wanted = max(states_kept_by(layer, self.tolerance), least)
        else:
            wanted = max(round(now * (least / now) ** (1 / max(left, 1))), least)
        return wanted if wanted <= (1 - WORTH) * now else 0
