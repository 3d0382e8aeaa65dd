"""What every resource costs, as a function of the widths, for this model on this device.

flops, params      exact, from the trace                                            (cost/flops.py, params.py)
memory             counted, from the trace and one training-mode forward            (cost/memory.py)
latency            identified from timings of shrunk copies                         (cost/latency.py)
energy             power × latency, or metered                                      (cost/energy.py)
train_flops        3 C_flops(n) per step: a forward, and a backward of twice that
train_time,        per step, in dense steps:  σ + (1 − σ) C_flops(n) / C_flops(N)
train_energy       σ = `FIXED`: what of a step does not shrink. A guess, corrected while the run goes on
                   (control/scale.py)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..budget import GAUGED
from ..structure.extents import Fixed
from ..structure.groups import Structure
from ..structure.record import copied
from ..structure.untouched import untouched
from .clock import device_clock
from .energy import energy
from .flops import flops
from .grid import Steps
from .instruments import Instruments
from .latency import latency
from .memory import memory
from .params import parameters
from .polynomial import Polynomial
from .replay import forward_on

__all__ = ["EXACT", "Bench", "Survey", "exact_costs", "step_share", "survey"]

FIXED = 0.15
EXACT: Mapping[str, Callable[[Structure], Polynomial]] = {
    "flops": flops,
    "params": parameters,
    "train_flops": lambda structure: 3.0 * flops(structure),
}


@dataclass(frozen=True)
class Bench:
    """What is measured, and with what."""

    model: nn.Module
    optimizer: Optimizer | None
    example_inputs: Any
    deploy_inputs: Any
    instruments: Instruments
    steps: Steps  # the widths of each group that will be used
    deployed: Structure | None = None  # with the work that the deploy inputs make; None: the example's


@dataclass(frozen=True)
class Survey:
    """What was measured of model and device when attaching.

    A resumed run and every replica go on with the same numbers, whatever their own device says.
    `costs`: resource -> C_k(n); `multiples`: widths that run well, per group, or empty (cost/grid.py);
    `least`: resource -> use of the narrowest net, where that was timed.
    """

    costs: Mapping[str, Polynomial]
    multiples: tuple[int, ...] = ()
    least: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def mark(self) -> str:
        """Tells one survey from another."""
        return repr(self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return {
            "costs": {name: cost.state_dict() for name, cost in self.costs.items()},
            "multiples": list(self.multiples),
            "least": dict(self.least),
        }

    @staticmethod
    def of(state: Mapping[str, Any]) -> Survey:
        costs = {name: Polynomial.from_state(cost) for name, cost in state["costs"].items()}
        least = {str(name): float(value) for name, value in state["least"].items()}
        return Survey(costs, tuple(int(m) for m in state["multiples"]), least)


def survey(
    names: Iterable[str], structure: Structure, bench: Bench, multiples: tuple[int, ...] = ()
) -> Survey:
    """C_k(n) of those resources that the trace alone does not tell; the model is left as it was found."""
    costs: dict[str, Polynomial] = {}
    least: dict[str, float] = {}
    for name in names:
        if name in ("train_time", "train_energy"):
            costs[name] = step_share(structure)
        elif name == "memory":
            costs[name] = memory(structure, bench.model, bench.optimizer, bench.example_inputs).peak
        elif name in GAUGED:
            if "latency" not in costs:
                costs["latency"], least["latency"] = _latency(structure, bench)
            if name == "energy":
                costs["energy"] = _energy(costs["latency"], bench)
                joules, seconds = (costs[k].value(structure.sizes) for k in ("energy", "latency"))
                least["energy"] = least["latency"] * joules / seconds
    return Survey(costs, multiples, {k: v for k, v in least.items() if not math.isnan(v)})


def _latency(structure: Structure, bench: Bench) -> tuple[Polynomial, float]:
    """Seconds over the widths, and of the narrowest net."""
    steps, seen = bench.steps, bench.deployed or structure
    found = latency(
        seen,
        bench.model,
        bench.deploy_inputs,
        rungs=steps.rungs(structure.sizes),
        floors=steps.floors,
        clock=bench.instruments.clock,
        cuda_graph=bench.instruments.cuda_graph,
    )
    return found.seconds, found.least


def _energy(seconds: Polynomial, bench: Bench) -> Polynomial:
    """By the meter of the bench, while the dense model runs."""
    model, meter = bench.model, bench.instruments.energy
    assert meter is not None
    inputs = copied(bench.deploy_inputs)
    device = next(model.parameters()).device
    forward = forward_on(device, cuda_graph=bench.instruments.cuda_graph)(model, inputs)
    with untouched(model), torch.no_grad():
        model.eval()
        return energy(seconds, meter, forward, clock=device_clock(device, bench.instruments.clock)).joules


def exact_costs(names: Iterable[str], structure: Structure) -> dict[str, Polynomial]:
    """Of those resources that the trace alone tells."""
    return {name: EXACT[name](structure) for name in names if name in EXACT}


def step_share(structure: Structure) -> Polynomial:
    """Time of a training step over that of a dense one, as believed before any was measured."""
    work = flops(structure)
    whole = work.value(structure.sizes)
    constant = Polynomial.of([(FIXED, (Fixed(1),))], len(structure.groups))
    return constant + ((1.0 - FIXED) / whole) * work
