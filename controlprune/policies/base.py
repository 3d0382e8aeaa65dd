"""What every policy is given, and what it answers: the interface between plant and controller.

A policy is a frozen settings object; `begin(setting)` gives the loop that runs with one model. The
loop sees statistics and answers masks; it never touches the model, and what it needs of the next step
(an observation, a recorded batch) it says beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ..cost.problem import Setting
from ..saliency.experiments import Trial
from ..saliency.network import Experiment

__all__ = ["Decision", "Loop", "Policy"]


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
