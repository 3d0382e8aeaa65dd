"""From a traced structure, a budget and what resources cost to the numbers a policy works with.

A run total (`train_flops` = 0.4) is feasible if a net at the floors, from the first step on, uses less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from .allocation import require_feasible
from .budget import MEASURED, TOTALS, Budget, Price
from .cost.flops import flops
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
    costs: Mapping[str, Polynomial],
    *,
    total_steps: int,
    round_to: int | None,
    batch: int,
    seed: int,
    multiples: Sequence[int] = (),
) -> Setting:
    """Targets as fractions of dense, steps and floors; an unreachable budget is an error.

    `costs`: at least those of the resources that `budget` names (resources.py).
    """
    sizes = structure.sizes
    grains = tuple(group.multiple for group in structure.groups)
    fine, steps = (
        tuple(math.lcm(step, grain) for step, grain in zip(found, grains, strict=True))
        for found in (width_steps(sizes, round_to), width_steps(sizes, round_to, multiples))
    )
    floors = tuple(min(step, size) for step, size in zip(fine, sizes, strict=True))
    targets = budget.targets() if isinstance(budget, Budget) else {}
    prices = budget.prices() if isinstance(budget, Price) else {}
    missing = [name for name in (*targets, *prices) if name not in costs]
    if missing:
        raise ValueError(
            f"budget: {', '.join(missing)} is measured when attaching; name it in attach(budget=…) to change "
            "it later"
        )
    used = {name: costs[name] for name in (*targets, *prices)}
    dense = {name: cost.value(sizes) for name, cost in used.items()}
    totals = frozenset(name for name in targets if name in TOTALS)
    limits = {name: target.limit(dense[name]) for name, target in targets.items() if name not in totals}
    limits |= {k: t.value * dense[k] for k, t in targets.items() if k in totals and t.relative}
    require_feasible([used[k] for k in limits], [limits[k] for k in limits], floors, sizes, list(limits))
    return Setting(
        structure=structure,
        costs=used,
        dense=dense,
        budget={name: limit / dense[name] for name, limit in limits.items() if name not in totals},
        prices=prices,
        totals=totals,
        measured=frozenset(used) & MEASURED,
        steps=steps,
        grains=grains if round_to is None else steps,
        floors=floors,
        total_steps=total_steps,
        batch=batch,
        flops=flops(structure).value(sizes),
        elements=_read_elements(structure),
        seed=seed,
    )


def _read_elements(structure: Structure) -> int:
    read = {part.tensor for group in structure.groups for part in group.readers}
    return sum(int(np.prod([size(e) for e in structure.tensors[name]])) for name in read)
