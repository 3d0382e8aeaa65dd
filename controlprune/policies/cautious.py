"""The trade-off of one update under caution: what is believed of the values, what may move, what must be met.

    n̄        uniform allocation under the limits                      (allocation.py)
    ṽ, s     values shrunk towards it as far as they are not trusted  (caution.py)
    n, m     max Σ ṽ_i − λ·C(n)  with floors, holds and hysteresis    (tradeoff.py)

A limit counts as filled when less than a tolerance of dense is left under it (`tolerances`): what the
cheapest unit costs, within [`NEAR`, `FAR`]; `FINE` of a run total, whose sum must come out; `ROUGH` of the
limit where the use is known by measuring only, and odd widths bought for the last per cent would be wasted.
Where none is filled, what keeps units from moving gives way: holds first, then the floors of the update.
Limits, prices: per resource, of the modelled use as a fraction of dense, and loss per dense use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..allocation import prior_values, uniform
from ..structure.groups import widths_of
from ..tradeoff import Problem, Solution, solve
from .base import Setting
from .caution import Values, floors, held, margin_scale, slew, trusted

__all__ = ["FAR", "Stand", "allocate", "believed", "tolerances", "uniform_under"]

NEAR, FAR, FINE, ROUGH = 0.009, 0.015, 0.004, 0.04


@dataclass(frozen=True)
class Stand:
    """Where the net is, and how freely it may move."""

    masks: tuple[Tensor, ...]
    young: Sequence[Tensor]  # recently switched, per group
    trust: float  # ρ: weight of the values against the uniform allocation
    at_budget: bool  # few units move at a time
    hysteresis: float


def uniform_under(setting: Setting, limits: Mapping[str, float]) -> tuple[int, ...]:
    """n̄; empty where nothing is to be met."""
    if not limits:
        return ()
    costs = [setting.costs[k] for k in limits]
    bounds = np.array([r * setting.dense[k] for k, r in limits.items()])
    return uniform(setting.structure.sizes, costs, bounds, setting.floors, setting.steps)


def believed(setting: Setting, values: Tensor, trust: float, even: tuple[int, ...]) -> tuple[Values, float]:
    """ṽ per group from v of all units, and s: the price at which the uniform allocation would be the best."""
    sizes = setting.structure.sizes
    split = tuple(x.numpy() for x in torch.split(values.double(), list(sizes)))
    if not even:
        return split, 0.0
    limited = [k for k in setting.costs if k not in setting.prices]
    shares = 1.0 / np.array([setting.dense[k] for k in limited])
    prior = prior_values(even, [setting.costs[k] for k in limited], sizes, shares)
    scale = margin_scale(split, prior, even)
    return trusted(split, prior, scale, trust), scale


def allocate(
    setting: Setting,
    values: Values,
    even: tuple[int, ...],
    stand: Stand,
    limits: Mapping[str, float],
    prices: Mapping[str, float],
) -> Solution:
    """Masks and shadow prices: under the limits where there are any, else by the prices alone."""
    names, dense = tuple(setting.costs), np.array(list(setting.dense.values()))
    sizes, steps, masks = setting.structure.sizes, setting.steps, stand.masks
    most = slew(sizes, steps)
    least = setting.floors
    if even:
        binding = most if stand.at_budget else None
        least = floors(least, steps, even, stand.trust, widths_of(masks), binding)
    bounds = np.array([limits.get(k, np.inf) for k in names]) * dense
    # dormant units are worth much the same: at a price they come back all at once, as many as may
    back = most if limits else np.maximum(np.array(steps), most // 2)
    problem = Problem(
        values=values,
        costs=tuple(setting.costs.values()),
        limits=bounds,
        prices=np.array([prices.get(k, 0.0) for k in names]) / dense,
        floors=least,
        steps=steps,
        grains=setting.grains,
        masks=tuple(m.numpy() for m in masks),
        held=held(values, masks, stand.young, back),
        hysteresis=stand.hysteresis,
        tolerance=tolerances(setting, limits, min(max(_grain(setting), NEAR), FAR)),
        resources=names,
    )
    solution = solve(problem)
    free, far = replace(problem, held=None), tolerances(setting, limits, FAR)
    for easier in (free, replace(free, floors=setting.floors)) if limits else ():
        if not (bounds - solution.costs > far * dense).all():
            break  # some limit is filled
        solution = solve(easier)
    return solution


def tolerances(setting: Setting, limits: Mapping[str, float], counted: float) -> NDArray[np.float64]:
    """[K], fractions of dense; `counted`: of what is known exactly."""

    def of(name: str) -> float:
        if name in setting.totals:
            return FINE
        return ROUGH * limits.get(name, 1.0) if name in setting.measured else counted

    return np.array([of(name) for name in setting.costs])


def _grain(setting: Setting) -> float:
    """What the cheapest unit of the dense net costs, fraction of dense, where that is most."""
    sizes, dense = np.array(setting.structure.sizes), setting.dense
    ones = np.ones(len(sizes))
    return max(float(c.marginals(sizes, ones).min()) / dense[k] for k, c in setting.costs.items())
