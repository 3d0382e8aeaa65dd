"""From a traced structure, a budget and what resources cost to the numbers a policy works with.

A run total (`train_flops` = 0.4) is feasible if a net at the floors, from the first step on, uses less.
Where time or energy is under budget, the widths between the multiples that the device runs well are not
used at all (cost/grid.py), and none below the first, where the budget can be met without by `ROOM` (a sum
over the run may need to be small while it can).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..budget import MEASURED, TOTALS, Budget, InfeasibleBudget, Price
from ..structure.extents import size
from ..structure.groups import Structure
from .flops import flops
from .grid import Steps
from .kept import kept
from .polynomial import Polynomial

__all__ = ["Problem", "feasible_range", "pose", "require_feasible", "require_steps"]

ROOM = 0.9  # of a limit


def pose(
    structure: Structure,
    budget: Budget | Price,
    costs: Mapping[str, Polynomial],
    *,
    total_steps: int,
    round_to: int | None,
    batch: int,
    seed: int,
    multiples: Sequence[int] = (),
    least: Mapping[str, float] | None = None,
) -> Problem:
    """Targets as fractions of dense, steps and floors; an unreachable budget is an error.

    `costs`: at least those of the resources that `budget` names (cost/survey.py). `least`: what the narrowest
    net was measured to use.
    """
    sizes = structure.sizes
    targets, prices = budget.targets(), budget.prices()
    sensed = MEASURED | {own.name for own in budget.own if own.measure is not None}
    missing = [name for name in (*targets, *prices) if name not in costs]
    if missing:
        raise ValueError(
            f"budget: {', '.join(missing)} is measured when attaching; name it in attach(budget=…) to change "
            "it later"
        )
    timed = not MEASURED.isdisjoint((*targets, *prices))
    steps = Steps.of(structure, round_to, multiples, timed=timed)
    used = {name: costs[name] for name in (*targets, *prices)}
    dense = {name: cost.value(sizes) for name, cost in used.items()}
    totals = frozenset(name for name in targets if name in TOTALS)
    limits = {name: target.limit(dense[name]) for name, target in targets.items() if name not in totals}
    limits |= {k: t.value * dense[k] for k, t in targets.items() if k in totals and t.relative}
    known = [(least or {}).get(k, 0.0) for k in limits]
    bounds = list(limits.values())
    try:
        require_feasible([used[k] for k in limits], bounds, steps.floors, sizes, list(limits), known)
    except InfeasibleBudget as error:
        stays = kept(structure, steps.floors, params="flops" not in limits and "params" in limits)
        raise InfeasibleBudget(f"{error}{stays}", error.ranges) from None
    floors = steps.ends(sizes)
    if totals or any(used[k].value(floors) > ROOM * limits[k] for k in limits):
        floors = steps.floors
    return Problem(
        structure=structure,
        costs=used,
        dense=dense,
        budget={name: limit / dense[name] for name, limit in limits.items() if name not in totals},
        prices=prices,
        totals=totals,
        measured=frozenset(used) & sensed,
        steps=steps.steps,
        grains=steps.grains,
        floors=floors,
        total_steps=total_steps,
        batch=batch,
        flops=flops(structure).value(sizes),
        elements=_read_elements(structure),
        seed=seed,
    )


def _read_elements(structure: Structure) -> int:
    read = {part.tensor for group in structure.groups for part in group.readers} | structure.entries.keys()
    return sum(int(np.prod([size(e) for e in structure.tensors[name]])) for name in read)


def require_steps(total_steps: object) -> int:
    """A horizon, or ValueError."""
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise ValueError(
            f"total_steps={total_steps!r}: give the number of training steps, a whole number >= 1"
        )
    return total_steps


@dataclass(frozen=True)
class Problem:
    """One attached model, in numbers: what is to be solved, for every policy.

    `structure`: its groups. Per resource: `costs`, C_k(n) in its unit; `dense`, C_k(N); `budget`, the
    target as a fraction of dense (empty under a Price); `prices`, loss per dense use (empty under a
    Budget); `totals`, those that are sums over the run; `measured`, those whose cost is a model that
    measurements correct. Per group: `steps`, of its width; `grains`, what every width must be a multiple of
    whatever the step; `floors`, the least width. Of the run: `total_steps`; `batch`, examples in the
    example inputs (taken for the mini-batch until one was seen); `seed`. Of the model: `flops` of one dense
    forward pass on the example inputs; `elements`, numbers in all readers, which one observation reads.
    """

    structure: Structure
    costs: Mapping[str, Polynomial]
    dense: Mapping[str, float]
    budget: Mapping[str, float]
    prices: Mapping[str, float]
    totals: frozenset[str]
    measured: frozenset[str]
    steps: tuple[int, ...]
    grains: tuple[int, ...]
    floors: tuple[int, ...]
    total_steps: int
    batch: int
    flops: float
    elements: int
    seed: int

    def split(self, vector: Tensor) -> tuple[Tensor, ...]:
        """A vector over all units, group by group."""
        return torch.split(vector, list(self.structure.sizes))

    def fraction(self, resource: str, widths: tuple[int, ...]) -> float:
        """C_k(n) / C_k(N)."""
        return self.costs[resource].value(np.asarray(widths)) / self.dense[resource]


def feasible_range(
    costs: Sequence[Polynomial],
    floors: Sequence[int],
    sizes: Sequence[int],
    least: Sequence[float] | None = None,
) -> tuple[tuple[float, float], ...]:
    """(least, dense) of every cost; `least`: what was measured at the floors, 0 where nothing was."""
    known = [0.0] * len(costs) if least is None else least
    pairs = zip(costs, known, strict=True)
    return tuple((max(cost.value(floors), low), cost.value(sizes)) for cost, low in pairs)


def require_feasible(
    costs: Sequence[Polynomial],
    limits: ArrayLike,
    floors: Sequence[int],
    sizes: Sequence[int],
    resources: Sequence[str] = (),
    least: Sequence[float] | None = None,
) -> tuple[tuple[float, float], ...]:
    """The feasible range; `InfeasibleBudget` if a limit lies below it."""
    ranges = feasible_range(costs, floors, sizes, least)
    names = list(resources) or [f"cost {k}" for k in range(len(costs))]
    low = [
        f"{name} <= {limit:.6g} (feasible: {least:.6g} to {dense:.6g}, i.e. {least / dense:.4f} of dense up)"
        for name, limit, (least, dense) in zip(names, np.asarray(limits, float), ranges, strict=True)
        if not limit >= least
    ]
    if low:
        raise InfeasibleBudget(
            f"the budget cannot be met: {'; '.join(low)}; raise the budget or lower the floors",
            dict(zip(names, ranges, strict=True)),
        )
    return ranges
