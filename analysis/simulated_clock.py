"""A clock that only simulated layers move, for tests and studies: the same on every machine.

    t_layer = slow (2e-4 + 4e-5 tiles^0.9) s a pass,    tiles = ⌈inputs/16⌉ ⌈outputs/16⌉

Whole tiles, and some for each call: no polynomial in the widths.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

__all__ = ["Ticker", "Timed"]


class Ticker:
    """The clock, in seconds; one and the same in every copy of the model. `slow`: how much slower it runs."""

    def __init__(self) -> None:
        self.seconds, self.slow = 0.0, 1.0

    def __deepcopy__(self, memo: object) -> Ticker:
        return self

    def __call__(self) -> float:
        return self.seconds


class Timed(nn.Linear):
    """Takes time; `backward`: of how many more passes in training."""

    def __init__(self, inputs: int, outputs: int, ticker: Ticker, backward: int = 0) -> None:
        super().__init__(inputs, outputs)
        self.ticker, self.backward_passes = ticker, backward

    def forward(self, input: Tensor) -> Tensor:
        outputs, inputs = self.weight.shape
        tiles = math.ceil(inputs / 16) * math.ceil(outputs / 16)
        passes = 1 + (self.backward_passes if self.training else 0)
        self.ticker.seconds += passes * self.ticker.slow * (2e-4 + 4e-5 * tiles**0.9)
        return super().forward(input)
