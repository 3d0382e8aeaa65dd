"""`attach`: checks what the user gives, traces the model, and starts a controller on it.

Nothing of the model or the optimizer is changed before everything has been checked.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..budget import GAUGED, MEASURED, Budget, Price, require_budget
from ..cost.clock import settle_heap
from ..cost.energy_meter import choose_meter
from ..cost.forward_time import Gauge
from ..cost.grid import Steps, group_multiples
from ..cost.instruments import Instruments
from ..cost.optimizer_state import require_carried
from ..cost.problem import require_steps
from ..cost.survey import EXACT, Bench, survey
from ..granularity.base import Granularity
from ..granularity.parse import granularity_of
from ..plant.base import is_sharded
from ..plant.joint import as_one
from ..plant.optimizer import require_nothing_beside
from ..policies.base import Policy
from ..policies.feedback.control import Control
from ..structure.analyse import tensors_in
from ..structure.groups import Structure
from ..structure.record import batch_size
from ..structure.surroundings import plainly
from ..structure.traced import Traced
from .controller import Controller
from .ends import require_unattached
from .metering import Metering
from .plain_model import require_plain_model
from .replicas import Replicas, several, unwrapped
from .run import Run
from .telling import Progress
from .terms import Terms, resources
from .together import Together

__all__ = ["attach"]


@plainly
def attach(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    *,
    budget: Budget | Price,
    example_inputs: Any,
    total_steps: int,
    policy: Policy | None = None,
    granularity: str | Granularity | Mapping[nn.Module | str, str | Granularity] = "channel",
    ignored_layers: Sequence[nn.Module | str] = (),
    round_to: int | None = None,
    seed: int = 0,
    deploy_inputs: Any = None,
    park_on: torch.device | str | None = None,
    instruments: Instruments | None = None,
    progress: bool = False,
) -> Controller:
    """Trace `model`, and steer it to `budget` over the next `total_steps` calls of `step`.

    `optimizer`: the one that steps the model, as it is or as a framework wrapped it (AcceleratedOptimizer),
    a list of those that each step a part, or None where the loop changes the weights by itself. `model` may
    stand in DistributedDataParallel, or be wrapped later; where its parameters are sharded, give
    `controlprune.trace` of the plain model as `example_inputs`. Else these are a tuple (positional) or a dict
    (keyword) that it accepts; FLOPs and memory are counted on them (for absolute run totals give the batch of
    a training step). `deploy_inputs`: what latency and energy are measured on, None: the same.
    `granularity`: what a unit is (docs/granularity.md). `round_to`: width multiple; None: what the device was
    measured to run well (cost/grid.py). `park_on`: the device on which weights and optimizer state of absent
    units wait; "cpu" spares an accelerator's memory, None: where they are. Where latency, energy or time is
    under budget, the C library keeps up to 62 MiB of freed memory from here on (cost/clock.py). `progress`: a
    line on stderr, kept up to date.
    Nothing of the model or the optimizer is changed before the first decision. Errors: TypeError and
    ValueError name the argument; InfeasibleBudget carries the range that can be reached.
    """
    policy = Control() if policy is None else policy
    given, model = model, unwrapped(model)[0] if isinstance(model, nn.Module) else model
    _check_arguments(model, budget, total_steps, policy)
    kind = granularity_of(granularity)
    _check_granularity(kind, budget, policy)
    stepper = as_one(optimizer)
    require_nothing_beside(stepper)
    instruments = _metered(instruments or Instruments(), budget, model)
    parking = _parking(park_on)
    sharded = _sharded(model, example_inputs, policy)
    structure, batch = _units(kind, model, example_inputs, ignored_layers, budget)
    _check_optimizer_covers(model, stepper, structure)
    if not sharded:
        require_carried(stepper, _touched(model, structure))
    named, measures = resources(budget), round_to is None and not several()
    timed, gauged = (not kinds.isdisjoint(named) for kinds in (MEASURED, GAUGED))
    if timed:
        settle_heap()
    multiples = group_multiples(structure, dict(model.named_parameters()), timed=timed) if measures else ()
    steps = Steps.of(structure, round_to, multiples, timed=timed)
    deploy, seen = (example_inputs if deploy_inputs is None else deploy_inputs), structure
    if deploy_inputs is not None and gauged:
        seen = _deployed(kind, structure, model, deploy, ignored_layers)
    bench = Bench(model, stepper, example_inputs, deploy, instruments, steps, seen)
    found = survey(named, structure, bench, multiples)
    terms = Terms(structure, found, budget, total_steps, batch, round_to, seed)
    replicas = Replicas()
    metering = Metering(terms, instruments, _gauge(terms, bench), replicas.mean_known)
    plant = kind.plant(model, stepper, structure, parking)
    run = Run(plant, stepper, terms, policy, replicas, metering, kind)
    controller = Controller(run, Together(run))
    if given is not model:
        controller.replicate(given)
    if progress:
        controller.on_update(Progress(sys.stderr))
    return controller


def _check_granularity(kind: Granularity, budget: Budget | Price, policy: Policy) -> None:
    kind.require(resources(budget), [own.name for own in budget.own if own.measure is None])
    if not kind.returns and getattr(policy, "shrink", True) is False:
        raise ValueError(
            f"policy: with granularity={kind!s} units leave the tensors at once; leave shrink=True"
        )


def _units(
    kind: Granularity,
    model: nn.Module,
    example_inputs: Any,
    ignored_layers: Sequence[nn.Module | str],
    budget: Budget | Price,
) -> tuple[Structure, int]:
    """The units of the model, and the batch of the inputs that it was traced with."""
    if isinstance(example_inputs, Traced):
        _check_traced_alone(budget)
        traced, batch = example_inputs.structure, example_inputs.batch
    else:
        traced = kind.trace(model, example_inputs, ignored_layers)
        batch = batch_size(example_inputs)
    if batch < 1:
        raise ValueError("example_inputs: the batch is empty; give one of at least one example")
    return kind.units(model, traced, tensors_in(model, ignored_layers)), batch


def _sharded(model: nn.Module, example_inputs: object, policy: Policy) -> bool:
    """Are its parameters sharded, and everything else as that needs it? (plant/sharded.py)"""
    if not is_sharded(model):
        return False
    if not isinstance(example_inputs, Traced):
        raise ValueError(
            "example_inputs: the parameters are sharded already; before that, make traced = "
            "controlprune.trace(model, example_inputs), and give example_inputs=traced"
        )
    from ..plant.fsdp import reshapes  # it imports a good deal of torch

    if getattr(policy, "shrink", False) and not reshapes(model):
        raise ValueError(
            "policy: parameters under tensor parallelism, or that FSDP2 cuts along other than their rows or "
            "offloads to the CPU, keep their shapes; give policy=controlprune.Control(shrink=False)"
        )
    return True


def _deployed(
    kind: Granularity,
    structure: Structure,
    model: nn.Module,
    inputs: Any,
    ignored_layers: Sequence[nn.Module | str],
) -> Structure:
    """The same groups, with the work that the deploy inputs make; as it was if they show other groups."""
    try:
        traced = kind.trace(model, inputs, ignored_layers)
    except ValueError as error:
        reason = error.__cause__ or error
        raise ValueError(f"deploy_inputs: the model's forward does not take them: {reason}") from error
    try:
        seen = kind.units(model, traced, tensors_in(model, ignored_layers))
    except ValueError:
        return structure
    if (seen.names, seen.sizes) != (structure.names, structure.sizes):
        return structure
    return replace(structure, work=seen.work, traffic=seen.traffic)


def _check_traced_alone(budget: Budget | Price) -> None:
    measured = [name for name in resources(budget) if name not in EXACT]
    if measured:
        raise ValueError(
            f"budget: {', '.join(measured)} cannot be known from a trace alone; give one of "
            f"{', '.join(EXACT)}, or the example inputs themselves"
        )


def _metered(instruments: Instruments, budget: Budget | Price, model: nn.Module) -> Instruments:
    """With a meter, where energy is under budget; NoMeter where there is none."""
    if not {"energy", "train_energy"} & set(resources(budget)):
        return instruments
    device = next(model.parameters()).device
    return replace(instruments, energy=choose_meter(device, instruments.energy))


def _gauge(terms: Terms, bench: Bench) -> Gauge | None:
    """Where something is measured of the forward pass itself."""
    names = [name for name in resources(terms.budget) if name in GAUGED]
    if not names:
        return None
    targets = terms.budget.targets()
    relative = {name: name not in targets or targets[name].relative for name in names}
    seconds = terms.survey.costs["latency"].value(terms.structure.sizes)
    return Gauge(bench.model, bench.deploy_inputs, relative, seconds, bench.instruments)


def _check_arguments(model: Any, budget: object, total_steps: object, policy: object) -> None:
    require_plain_model(model)
    require_budget(budget)
    require_steps(total_steps)
    if not callable(getattr(policy, "begin", None)):
        raise TypeError(f"policy={policy!r}: give a policy object such as controlprune.Control()")
    require_unattached(model)


def _parking(park_on: object) -> torch.device | None:
    try:
        device = None if park_on is None else torch.device(park_on)  # type: ignore[arg-type]
        if device is not None:
            torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(
            f'park_on={park_on!r}: give a device that is here, such as "cpu", or None'
        ) from error
    if device is not None and device.type == "meta":
        raise ValueError(f'park_on={park_on!r}: it keeps no values; give "cpu", say, or None')
    return device


def _touched(model: nn.Module, structure: Structure) -> dict[str, nn.Parameter]:
    """The parameters in which units stand."""
    names = {part.tensor for group in structure.groups for part in group.slices} | structure.entries.keys()
    return {name: p for name, p in model.named_parameters() if name in names}


def _check_optimizer_covers(model: nn.Module, optimizer: Optimizer | None, structure: Structure) -> None:
    if optimizer is None:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    touched = _touched(model, structure)
    missing = [name for name, p in touched.items() if p.requires_grad and id(p) not in held]
    if missing:
        raise ValueError(
            f"optimizer: it does not hold {len(missing)} trainable parameters of prunable layers "
            f"({', '.join(missing[:5])}); add them to it, freeze them, or name their layers in ignored_layers"
        )
