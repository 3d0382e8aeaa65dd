"""What every policy is given, and what it answers: the interface between plant and controller.

A policy is a frozen settings object; `begin(setting)` gives the loop that runs with one model. The
loop sees statistics and answers masks; it never touches the model, and what it needs of the next step
(an observation, a recorded batch) it says beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from ..cost.polynomial import Polynomial
from ..gates import Experiment
from ..structure.groups import Structure

__all__ = ["Decision", "Loop", "Policy", "Setting", "Trial"]


@dataclass(frozen=True)
class Setting:
    """One attached model, in numbers. Resources are fractions of dense unless said otherwise."""

    structure: Structure
    costs: Mapping[str, Polynomial]  # resource -> C_k(n), absolute
    dense: Mapping[str, float]  # resource -> C_k(N)
    budget: Mapping[str, float]  # resource -> target, fraction of dense; empty under a Price
    prices: Mapping[str, float]  # resource -> given price, loss per dense use; empty under a Budget
    totals: frozenset[str]  # resources under budget that are sums over the run
    measured: frozenset[str]  # resources whose cost is a model that measurements correct
    steps: tuple[int, ...]  # width step per group
    grains: tuple[int, ...]  # what every width must be a multiple of, whatever the step
    floors: tuple[int, ...]
    total_steps: int
    batch: int  # examples in the example inputs: what is taken for the mini-batch until one was seen
    flops: float  # of one dense forward pass on the example inputs
    elements: int  # numbers in all readers: what one observation reads
    seed: int

    def fraction(self, resource: str, widths: tuple[int, ...]) -> float:
        return self.costs[resource].value(np.asarray(widths)) / self.dense[resource]


@dataclass(frozen=True)
class Trial:
    """A paired ablation to carry out: switch these units of one group, measure the loss."""

    group: int
    units: Tensor  # positions within the group
    off: bool


@dataclass(frozen=True)
class Decision:
    """What the plant is to become: masks per group, physically shrunk or not."""

    masks: tuple[Tensor, ...]
    compact: bool
    reference: Mapping[str, float]
    price: Mapping[str, float]
    event: str = ""


class Loop(Protocol):
    """One run of a policy. All methods are called between optimizer steps."""

    def first(self) -> Decision | None: ...

    def wants_gradients(self, step: int) -> bool: ...

    def wants_batch(self, step: int) -> bool: ...

    def see_batch(self, examples: int) -> None: ...

    def observe(self, gradients: Tensor, weights: Tensor) -> None:
        """Gate gradients and squared norms per unit, NaN where not observed (norms: at updates only)."""
        ...

    def watch(self, step: int, loss: float) -> None: ...

    def trials(self, step: int, masks: tuple[Tensor, ...], compact: bool) -> list[Trial]: ...

    def feel(self, resource: str, widths: tuple[int, ...], measured: float, spread: float) -> None: ...

    def account(self, resource: str, widths: tuple[int, ...], spent: float, limit: float) -> None: ...

    def realised(self, widths: tuple[int, ...]) -> Mapping[str, float]: ...

    def retarget(self, setting: Setting) -> None: ...

    def describe(self) -> list[str]: ...

    def learn(self, step: int, masks: tuple[Tensor, ...], outcomes: list[Experiment]) -> None: ...

    def wants_probe(self, step: int, compact: bool) -> bool: ...

    def wants_decision(self, step: int) -> bool: ...

    def decide(self, step: int, masks: tuple[Tensor, ...], compact: bool) -> Decision: ...

    def last(self, masks: tuple[Tensor, ...]) -> Decision: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Policy(Protocol):
    def begin(self, setting: Setting) -> Loop: ...
