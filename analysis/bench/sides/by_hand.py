"""What people do without a controller: score the units, cut at fixed steps, go on training.

The score of unit i, with a_t = ∂L/∂gate_i at step t (units.py), is one of

    fisher      Σ a_t²                   movement   −Σ a_t  (growth of ‖w_i‖²/2 per learning rate)
    first       |Σ a_t|                  norm       ‖w_i‖²,  now
    magnitude   ‖w_i‖ / (median of its group)               random     anything

and the sums run over all steps since the start (`window=True`: since the last cut). A cut costs nothing here:
slicing a network by hand is not on the clock, what it needs to know of the gradients is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..allocation import Shape, chosen, uniform_widths
from ..units import Units
from .side import Run, Side

__all__ = ["ByHand", "Scratch", "cubic", "even"]

Score = Literal["fisher", "movement", "first", "norm", "magnitude", "random"]
OBSERVED = ("fisher", "movement", "first")
Cuts = tuple[tuple[float, float], ...]  # progress, and how far down from dense (0) to the budget (1)


def even(*at: float) -> Cuts:
    """Equal stages at these fractions of the run."""
    return tuple((x, (k + 1) / len(at)) for k, x in enumerate(at))


def cubic(start: float, end: float, count: int = 8) -> Cuts:
    """1 − (1 − x)³ of the way, x = 1/count … 1   (Zhu and Gupta, arXiv 1710.01878)."""
    xs = [(k + 1) / count for k in range(count)]
    return tuple((start + (end - start) * x, 1 - (1 - x) ** 3) for x in xs)


@dataclass
class ByHand(Side):
    score: Score
    cuts: Cuts
    shape: Shape = "uniform"
    window: bool = False

    def begin(self, run: Run) -> None:
        super().begin(run)
        with run.clock.paused():
            self.units = Units(run.model, run.optimizer, run.example)
            self._sums = [torch.zeros(n) for n in self.units.sizes]
            self._left = [(round(at * run.steps), depth) for at, depth in self.cuts]
            self._cut(0)

    @property
    def share(self) -> float:
        return self.units.share

    def observe(self, step: int) -> None:
        if self.score in OBSERVED and self._left:
            for total, a in zip(self._sums, self.units.gate_gradients(), strict=True):
                total += a * a if self.score == "fisher" else -a if self.score == "movement" else a

    def after(self, step: int, loss: Tensor) -> None:
        with self.run.clock.paused():
            self._cut(step)

    def _cut(self, step: int) -> None:
        while self._left and self._left[0][0] <= step:
            _, depth = self._left.pop(0)
            share = 1.0 - (1.0 - self.run.budget) * depth
            self.units.cut(chosen(self.units, self._scores(), share, self.shape))
            if self.window:
                self._sums = [torch.zeros(n) for n in self.units.sizes]

    def _scores(self) -> Sequence[Tensor]:
        if self.score in OBSERVED:
            return [s.abs() for s in self._sums] if self.score == "first" else self._sums
        if self.score == "random":
            generator = torch.Generator().manual_seed(self.run.seed)
            return [torch.rand(n, generator=generator) for n in self.units.sizes]
        norms = self.units.norms()
        if self.score == "norm":
            return norms
        return [n.sqrt() / n.sqrt().nanmedian() for n in norms]


class Scratch(Side):
    """The small network from the start, from random weights, at uniform widths or at those ours found."""

    def __init__(self, *, found: bool = False) -> None:
        self.found = found

    def begin(self, run: Run) -> None:
        super().begin(run)
        with run.clock.paused():
            run.model = run.task.blank(run.seed)
            self.units = Units(run.model, None, run.example)
            widths = run.found if self.found else uniform_widths(self.units, run.budget)
            assert widths is not None
            self.units.cut(
                [torch.arange(n) < width for n, width in zip(self.units.sizes, widths, strict=True)]
            )
            if run.task.reset:
                torch.manual_seed(run.seed)
                for module in run.model.modules():
                    if callable(reset := getattr(module, "reset_parameters", None)):
                        reset()
            run.optimizer = run.task.optimizer(run.model)

    @property
    def share(self) -> float:
        return self.units.share
