"""The gauge: what the live model's forward takes on this device, measured once its tensors have their shapes.

A masked net still runs dense, so only a compact layout is measured: a copy of the live model in eval mode
without gradients on the deploy inputs, in turn with a dense copy made when attaching (A B A B …), so that a
machine that others use too slows both alike::

    y = t(live) / t(dense copy)            where the limit is a fraction of dense
    y = t(live) / T_dense                  where it is an amount: seconds are seconds
    relative error = BURSTS √(spread_live² + spread_dense²) / √rounds

(BURSTS: what else runs on the machine lasts for several rounds, so they do not err apart. On two shared cores
under a load of 10, 25 readings of an MLP scattered by 2.5 (relative) and 2.9 times (seconds) what they would
without, of a CNN by 1.5 and 2.7.)
Joules are taken as power × time, the power that of the dense model (cost/energy.py).
The model itself is never run; random states that the copies share come back (structure/record.py).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import FunctionType, MethodType

import torch
from torch import nn

from ..structure.record import ExampleInputs, copied
from ..structure.saying import warn
from ..structure.untouched import untouched
from .clock import Timing, device_clock, measure_interleaved
from .instruments import Instruments
from .replay import WARM, NotCaptured, forward_on

__all__ = ["Gauge", "Reading", "isolated"]

SHORT, LONG = 0.2, 2.0  # seconds of one measurement, at least and at most
BURSTS = 3.0
FORWARDS = 40  # dense ones that it should have time for


@dataclass(frozen=True)
class Reading:
    """One timing: use of every resource (fraction of dense), its relative error, forwards of either net."""

    use: Mapping[str, float]
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
        self._device, self._cuda_graph = next(model.parameters()).device, instruments.cuda_graph
        self._clock = device_clock(self._device, instruments.clock)
        self._fails = False
        self._yardstick = self._twin(model) if any(relative.values()) else None

    def read(self, model: nn.Module) -> Reading | None:
        """Of the model as it is laid out now, on a copy; None where it cannot be copied or captured."""
        twin = self._twin(model)
        if twin is None:
            return None
        try:
            live, dense = self._time(twin)
        except NotCaptured as error:
            self._give_up(str(error))
            return None
        noise = math.hypot(live.spread, dense.spread if dense is not None else 0.0)
        use = {
            name: live.median / (dense.median if relative and dense is not None else self.seconds)
            for name, relative in self._relative.items()
        }
        spread = BURSTS * noise / math.sqrt(live.rounds)
        runs = [0 if timing is None else timing.runs + WARM * self._cuda_graph for timing in (live, dense)]
        return Reading(use, spread, *runs)

    def _twin(self, model: nn.Module) -> nn.Module | None:
        """A copy of the model, where it can be had; what can't be is said once."""
        if self._fails:
            return None
        try:
            return isolated(model)
        except Exception as error:
            self._give_up(f"the model can't be copied ({type(error).__name__}: {error})")
            return None

    def _give_up(self, why: str) -> None:
        self._fails = True
        warn(
            f"controlprune: {why}, so its latency is not measured during the run, only modelled from what "
            "was timed when attaching",
        )

    def _time(self, twin: nn.Module) -> tuple[Timing, Timing | None]:
        seconds = min(max(FORWARDS * self.seconds, SHORT), LONG)
        yardstick = self._yardstick
        nets = [twin] if yardstick is None else [twin, yardstick]
        forward = forward_on(self._device, cuda_graph=self._cuda_graph)  # graphs of before are gone
        forwards = [forward(net, self._inputs) for net in nets]
        with untouched(twin), torch.no_grad():
            timings = measure_interleaved(forwards, clock=self._clock, seconds=seconds)
        return timings[0], timings[1] if len(timings) > 1 else None


def isolated(model: nn.Module) -> nn.Module:
    """A copy in eval mode that shares nothing with the model: hooks that are plain functions stay behind."""
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    for module in twin.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, FunctionType | MethodType)]:
                del hooks[key]
    return twin
