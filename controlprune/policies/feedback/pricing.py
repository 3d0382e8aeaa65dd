"""The prices: one regulator per resource, tuned to how the resource turns out to answer its price.

    where the solver meets the reference exactly      λ_k is its shadow price; the regulator tracks it
    where the price itself steers (invert=False)      λ_k(t) = s(t) p_k(t),  p_k(t + 1) = regulator(y_k − r_k)
    where the user set the price (`Price`)            nothing to regulate

Feed-forward: s is the price at which the uniform allocation at the reference would be the best one, by the
values as they are now (`follow`; saliency/worth.py). Values fall by orders of magnitude while a net learns,
and a moved reference asks for another price at once; both are in s. What is left to the regulator is the
relative price p, about 1, for what the values know better.

`regulator="auto"` starts from the νPI designed for the prior belief (gain 0.3, 60° of phase margin, a delay
margin of `LATE` updates), identifies e_{t+1} = a e_t + b u_{t+1} + c, u = log p, from what the price does to
e = y − r (price/identify.py; of y itself the feed-forward's share would be taken for a slow pole) and
designs the gains anew every `REDESIGN` updates (price/design.py); `describe` says what it chose and why.
Masks move by limited steps (dwell, few come back at once), which looks like a small gain or a slow plant
while the price runs: so the price is limited in its rate, a gain is believed only near the prior, and a pole
only if it is quick.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from ...control.state import pack, unpack
from ...price.identify import Identifier, PriceState, Response
from ...price.pi import PI, PIState

__all__ = ["Prices", "Regulator"]

Regulator = PI | Literal["auto"]
RATE = 0.7  # of the log price per update: masks answer slower than any price can move
TRUSTED = 3.0  # factor about the prior belief within which an identified gain is believed
SLOWEST = 0.5  # pole: a false one is an overlarge proportional gain, K_P = K_I a / (1 − a)
REDESIGN = 8  # updates; as many must have been seen before the first one
LATE = 8.0  # updates of delay that the loop must bear beside the plant's own
UNKNOWN = 1e-2  # s before any values were seen, loss per dense use


class Prices:
    """The states of all regulators of a run."""

    def __init__(self, regulator: Regulator, names: tuple[str, ...]) -> None:
        self._given = regulator
        self._identifier = Identifier(trusted=TRUSTED, slowest=SLOWEST)
        self._regulators: dict[str, PI] = {}
        self._states: dict[str, PIState] = {}
        self._fits: dict[str, PriceState] = {}
        self._seen: dict[str, int] = {}
        self._scale = UNKNOWN  # s
        self.cover(names)

    def cover(self, names: tuple[str, ...]) -> None:
        """Regulate these resources: new ones from the start, known ones as they are, others no more."""
        for name in set(self._regulators) - set(names):
            for kept in (self._regulators, self._states, self._fits, self._seen):
                del kept[name]
        for name in names:
            if name not in self._regulators:
                self._regulators[name] = PI(rate=RATE) if isinstance(self._given, str) else self._given
                self._states[name] = self._regulators[name].init()
                self._fits[name], self._seen[name] = self._identifier.init(), 0

    def now(self) -> dict[str, float]:
        return {name: self._scale * state.price for name, state in self._states.items()}

    def follow(self, scale: float) -> None:
        """s, from the values of this update; one that is no price is left out."""
        if 0.0 < scale < math.inf:
            self._scale = scale

    def track(self, name: str, use: float, reference: float, shadow: float) -> None:
        """The solver met the reference at this shadow price."""
        applied = shadow / self._scale
        self._states[name] = self._regulators[name].update(self._states[name], use - reference, applied)

    def regulate(self, name: str, use: float, reference: float) -> None:
        """The price of the last call led to this use; the next one."""
        state = self._regulators[name].update(self._states[name], use - reference)
        self._states[name] = state
        if self._given != "auto":
            return
        self._fits[name] = self._identifier.update(self._fits[name], use - reference, state.price)
        self._seen[name] += 1
        if self._seen[name] % REDESIGN == 0:
            from ...price.design import design  # python-control takes half a second to import

            self._regulators[name] = replace(
                design(self.response(name), delay_margin=LATE).regulator, rate=RATE
            )

    def response(self, name: str) -> Response:
        """How the resource answers its log price, as identified so far."""
        return self._identifier.response(self._fits[name])

    def describe(self) -> list[str]:
        """What regulates each price, and why, for the report."""
        lines = []
        for name, regulator in self._regulators.items():
            if self._seen[name] < REDESIGN:
                continue
            from ...price.design import margins

            response = self.response(name)
            margin = margins(response, regulator)
            lines.append(
                f"price of {name}: PI, K_I = {regulator.integral:.3g}, K_P = {regulator.proportional:.3g}, "
                f"for the identified gain {response.gain:.3g} and pole {response.pole:.3g}: gain "
                f"margin {margin.gain:.3g}, phase margin {margin.phase:.0f}°, delay margin "
                f"{margin.delay:.1f} updates"
            )
        return lines

    def state_dict(self) -> dict[str, Any]:
        loops = {
            name: {
                "state": pack(self._states[name]),
                "fit": pack(self._fits[name]),
                "seen": self._seen[name],
                "gains": pack(self._regulators[name]),
            }
            for name in self._regulators
        }
        return {"scale": self._scale, "loops": loops}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._scale = float(state["scale"])
        if not self._scale > 0.0:
            raise ValueError(f"prices: scale={self._scale} is not positive")
        for name, regulator in self._regulators.items():
            saved = state["loops"][name]
            self._regulators[name] = unpack(regulator, saved["gains"])
            self._states[name] = unpack(self._states[name], dict(saved["state"]))
            self._fits[name] = unpack(self._fits[name], saved["fit"])
            self._seen[name] = int(saved["seen"])
