"""The gauge: what the live model's forward takes on this device, measured once its tensors have their shapes.

A masked net still runs dense, so only a compact layout is measured: the live model in eval mode without
gradients on the deploy inputs, in turn with a dense copy made when attaching (A B A B …), so that a machine
that others use too slows both alike::

    y = t(live) / t(dense copy)            where the limit is a fraction of dense
    y = t(live) / T_dense                  where it is an amount: seconds are seconds
    relative error = BURSTS √(spread_live² + spread_dense²) / √rounds

(BURSTS: what else runs on the machine lasts for several rounds, so they do not err apart.)
Joules are taken as power × time, the power that of the dense model (cost/energy.py).
Nothing of the model changes: modes, buffers and random state come back (structure/record.py).
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..structure.record import ExampleInputs, call_model, copied, untouched
from .clock import Timing, device_clock, measure_interleaved
from .instruments import Instruments

__all__ = ["Gauge", "Reading"]

log = logging.getLogger("controlprune")
SHORT, LONG = 0.2, 2.0  # seconds of one measurement, at least and at most
BURSTS = 3.0  # a guess
FORWARDS = 40  # dense ones that it should have time for


@dataclass(frozen=True)
class Reading:
    """Fraction of dense, its relative error, and how many forwards the measurement took of either net.

    One measurement is for all resources.
    """

    fraction: float
    spread: float
    live: int
    dense: int


class Gauge:
    """Measures latency and energy; `relative`: by resource; `seconds`: of a dense forward when attached."""

    def __init__(
        self,
        model: nn.Module,
        inputs: ExampleInputs,
        relative: Mapping[str, bool],
        seconds: float,
        instruments: Instruments,
    ) -> None:
        self.resources = tuple(relative)
        self._relative, self.seconds = dict(relative), seconds
        self._inputs = copied(inputs)
        self._clock = device_clock(next(model.parameters()).device, instruments.clock)
        self._yardstick = _copy_of(model) if any(relative.values()) else None

    def read(self, model: nn.Module) -> dict[str, Reading]:
        """All resources, of the model as it is laid out now."""
        live, dense = self._time(model)
        found = {}
        for name in self.resources:
            whole = dense.median if self._relative[name] and dense is not None else self.seconds
            noise = math.hypot(live.spread, dense.spread if dense is not None else 0.0)
            spread = BURSTS * noise / math.sqrt(live.rounds)
            beside = dense.runs if dense is not None else 0
            found[name] = Reading(live.median / whole, spread, live.runs, beside)
        return found

    def _time(self, model: nn.Module) -> tuple[Timing, Timing | None]:
        seconds = min(max(FORWARDS * self.seconds, SHORT), LONG)
        yardstick = self._yardstick
        with untouched(model), torch.no_grad():
            model.eval()
            forwards = [lambda: call_model(model, self._inputs)]
            if yardstick is not None:
                forwards.append(lambda: call_model(yardstick, self._inputs))
            timings = measure_interleaved(forwards, clock=self._clock, seconds=seconds)
        return timings[0], timings[1] if len(timings) > 1 else None


def _copy_of(model: nn.Module) -> nn.Module | None:
    """A dense copy to compare with, without hooks; None where the model can't be copied."""
    try:
        twin = copy.deepcopy(model).eval().requires_grad_(False)
    except Exception as error:
        log.warning("latency: the model can't be copied (%s); fractions are of its time when attached", error)
        return None
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return twin
