"""From a traced structure and a budget to the numbers a policy works with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from .allocation import require_feasible
from .budget import Budget, Price, require_supported
from .cost.flops import flops
from .cost.params import parameters
from .cost.polynomial import Polynomial
from .policies.base import Setting
from .structure.extents import size
from .structure.groups import Structure

__all__ = ["make_setting", "width_steps"]


def width_steps(
    sizes: tuple[int, ...], round_to: int | None, multiples: Sequence[int] = ()
) -> tuple[int, ...]:
    """Width step per group: `round_to`, or the power of two under N/16, at most 16.

    `multiples`: what the device runs well, per group; a power of two under it gives way (rounding.py).
    """
    if round_to is not None:
        if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
            raise ValueError(f"round_to={round_to!r}: give a whole number of units >= 1, or None")
        return tuple(min(round_to, n) for n in sizes)
    powers = tuple(int(2 ** np.clip(np.floor(np.log2(max(1, n / 16))), 0, 4)) for n in sizes)
    return tuple(max(p, m) for p, m in zip(powers, multiples, strict=True)) if multiples else powers


def make_setting(
    structure: Structure,
    budget: Budget | Price,
    *,
    total_steps: int,
    round_to: int | None,
    batch: int,
    seed: int,
    multiples: Sequence[int] = (),
) -> Setting:
    """Costs, targets as fractions of dense, steps and floors; an unreachable budget is an error."""
    costs: dict[str, Polynomial] = {"flops": flops(structure), "params": parameters(structure)}
    sizes = structure.sizes
    dense = {name: cost.value(np.array(sizes)) for name, cost in costs.items()}
    grains = tuple(group.multiple for group in structure.groups)
    fine, steps = (
        tuple(math.lcm(step, grain) for step, grain in zip(found, grains, strict=True))
        for found in (width_steps(sizes, round_to), width_steps(sizes, round_to, multiples))
    )
    floors = tuple(min(step, size) for step, size in zip(fine, sizes, strict=True))
    require_supported(budget)
    target: dict[str, float] = {}
    prices: dict[str, float] = {}
    if isinstance(budget, Budget):
        limits: Mapping[str, float] = budget.limits(dense)
        target = {name: limit / dense[name] for name, limit in limits.items()}
        used = {name: costs[name] for name in target}
        require_feasible(list(used.values()), [limits[k] for k in used], floors, sizes, list(used))
    else:
        prices = budget.prices()
    names = [*target, *prices]
    return Setting(
        structure=structure,
        costs={name: costs[name] for name in names},
        dense={name: dense[name] for name in names},
        budget=target,
        prices=prices,
        steps=steps,
        grains=grains if round_to is None else steps,
        floors=floors,
        total_steps=total_steps,
        batch=batch,
        flops=dense["flops"],
        elements=_read_elements(structure),
        seed=seed,
    )


def _read_elements(structure: Structure) -> int:
    read = {part.tensor for group in structure.groups for part in group.readers}
    return sum(int(np.prod([size(e) for e in structure.tensors[name]])) for name in read)
