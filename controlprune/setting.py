"""From a traced structure, a budget and what resources cost to the numbers a policy works with.

A run total (`train_flops` = 0.4) is feasible if a net at the floors, from the first step on, uses less.
Where time or energy is under budget, the widths between the multiples that the device runs well are not
used at all (rounding.py), and none below the first, where the budget can be met without by `ROOM` (a sum
over the run may need to be small while it can).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .allocation import ladder, require_feasible
from .budget import MEASURED, TOTALS, Budget, Price
from .cost.flops import flops
from .cost.polynomial import Polynomial
from .policies.base import Setting
from .structure.extents import size
from .structure.groups import Structure

__all__ = ["Steps", "make_setting", "width_steps"]

ROOM = 0.9  # of a limit


@dataclass(frozen=True)
class Steps:
    """The widths that every group may have: its floor, multiples of its step, dense."""

    steps: tuple[int, ...]
    grains: tuple[int, ...]  # what finer steps, where they are taken, are multiples of
    floors: tuple[int, ...]

    @staticmethod
    def of(
        structure: Structure, round_to: int | None, multiples: Sequence[int] = (), *, timed: bool = False
    ) -> Steps:
        """`timed`: what the clock says is under budget."""
        sizes, own = structure.sizes, tuple(group.multiple for group in structure.groups)
        fine, steps = (
            tuple(math.lcm(step, grain) for step, grain in zip(found, own, strict=True))
            for found in (width_steps(sizes, round_to), width_steps(sizes, round_to, multiples))
        )
        whole = timed and len(multiples) > 0
        grains = tuple(
            step if round_to is not None or (whole and multiples[g] > 1) else own[g]
            for g, step in enumerate(steps)
        )
        floors = tuple(min(step, size) for step, size in zip(fine, sizes, strict=True))
        return Steps(steps, grains, floors)

    def ends(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Floors that are whole grains."""
        return tuple(map(max, self.floors, map(min, self.grains, sizes)))

    def rungs(self, sizes: Sequence[int]) -> list[tuple[int, ...]]:
        """The widths from there on, per group."""
        return [
            tuple(int(n) for n in ladder(size, floor, step))
            for size, floor, step in zip(sizes, self.ends(sizes), self.steps, strict=True)
        ]


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
    least: Mapping[str, float] | None = None,
) -> Setting:
    """Targets as fractions of dense, steps and floors; an unreachable budget is an error.

    `costs`: at least those of the resources that `budget` names (resources.py). `least`: what the narrowest
    net was measured to use.
    """
    sizes = structure.sizes
    targets = budget.targets() if isinstance(budget, Budget) else {}
    prices = budget.prices() if isinstance(budget, Price) else {}
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
    require_feasible([used[k] for k in limits], bounds, steps.floors, sizes, list(limits), known)
    floors = steps.ends(sizes)
    if totals or any(used[k].value(floors) > ROOM * limits[k] for k in limits):
        floors = steps.floors
    return Setting(
        structure=structure,
        costs=used,
        dense=dense,
        budget={name: limit / dense[name] for name, limit in limits.items() if name not in totals},
        prices=prices,
        totals=totals,
        measured=frozenset(used) & MEASURED,
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
    read = {part.tensor for group in structure.groups for part in group.readers}
    return sum(int(np.prod([size(e) for e in structure.tensors[name]])) for name in read)
