"""Sensors of the user's own: what a copy of the live net really uses, as a fraction of dense."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from ..budget import Budget, Price
from ..structure.saying import warn
from .forward_time import isolated

__all__ = ["Own"]


class Own:
    """`dense`: resource -> use of the dense net. A sensor that fails is given up with one warning."""

    def __init__(self, dense: Mapping[str, float], budget: Budget | Price) -> None:
        self._dense = dense
        self.sensed = {own.name: own.measure for own in budget.own if own.measure is not None}

    def read(self, model: nn.Module) -> dict[str, float]:
        """By resource; nan where it can't be said."""
        found = dict.fromkeys(self.sensed, math.nan)
        for name, measure in list(self.sensed.items()):
            try:
                found[name] = float(measure(isolated(model))) / self._dense[name]
            except Exception as error:
                del self.sensed[name]
                warn(
                    f"controlprune: {name} could not be measured ({type(error).__name__}: {error}); it "
                    "stays as its cost models it",
                )
        return found
