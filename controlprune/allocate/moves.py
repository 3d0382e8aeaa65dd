"""The space that `search` walks: a rung of allowed widths per group, and what a move changes.

A move of group g from rung i to i ± j changes u units, the worth by ΔV and the resources by ΔC_k, evaluated
at the present widths n:

    ΔV = |V_g(n′_g) − V_g(n_g)|,    ΔC_k = |C_k(n) − C_k(n ∓ u e_g)|,    ΔN = ΔV − λ·ΔC

Widths in units, worth in loss, costs in the resource's unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..cost.polynomial import Polynomial

__all__ = ["Array", "Moves", "Rungs", "Space", "moves_from", "single"]

Array = NDArray[np.float64]
Rungs = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Space:
    """Allowed widths of all groups one after the other, V there, and the costs.

    A state is `at`: [G], indices into `rungs`; those of group g are start[g] … start[g + 1] − 1.
    """

    rungs: Rungs  # allowed widths, ascending in each group
    worth: Array  # V_g at them
    start: Rungs  # [G + 1]
    curves: tuple[Array, ...]  # V_g(0 … N_g)
    costs: tuple[Polynomial, ...]
    limits: Array
    prices: Array
    dense: Array
    tolerance: Array | float  # of dense, per resource

    @staticmethod
    def of(
        ladders: Sequence[Rungs],
        curves: Sequence[Array],
        costs: tuple[Polynomial, ...],
        limits: Array,
        prices: Array,
        dense: Array,
        tolerance: Array | float,
    ) -> Space:
        worth = [curve[rungs] for rungs, curve in zip(ladders, curves, strict=True)]
        return Space(
            rungs=np.concatenate(ladders),
            worth=np.concatenate(worth),
            start=np.cumsum([0, *map(len, ladders)]),
            curves=tuple(curves),
            costs=costs,
            limits=limits,
            prices=prices,
            dense=dense,
            tolerance=tolerance,
        )

    @property
    def ladders(self) -> list[Rungs]:
        return np.split(self.rungs, self.start[1:-1])

    @property
    def bottom(self) -> Rungs:
        return self.start[:-1]

    @property
    def top(self) -> Rungs:
        return self.start[1:] - 1

    def nearest(self, widths: Rungs) -> Rungs:
        """The state with these widths, or the next ones above."""
        places = [np.searchsorted(rungs, n) for rungs, n in zip(self.ladders, widths, strict=True)]
        return np.minimum(self.bottom + np.array(places, dtype=np.int64), self.top)

    def resources(self, at: Rungs) -> Array:
        return np.array([cost.value(self.rungs[at]) for cost in self.costs])

    def landed(self, resources: Array) -> NDArray[np.bool_]:
        """[…, K] -> […]: near enough under some limit (always, where a price decides)."""
        if self.prices.any() or np.isinf(self.limits).all():
            return np.ones(resources.shape[:-1], dtype=bool)
        return np.asarray((resources >= self.limits - self.tolerance * self.dense).any(axis=-1))

    def rank(self, at: Rungs) -> tuple[bool, float]:
        resources = self.resources(at)
        return bool(self.landed(resources)), float(self.worth[at].sum() - self.prices @ resources)


@dataclass(frozen=True, eq=False)
class Moves:
    """Moves by 1 … M rungs from one state, one direction: [G, M]; where there is none, `units` is 0."""

    units: Rungs  # units taken on or off
    value: Array  # |ΔV|
    cost: Array  # |ΔC_k| of the whole move, [K, G, M]

    def net(self, prices: Array) -> Array:
        return self.value - np.tensordot(prices, self.cost, axes=1)


def moves_from(space: Space, at: Rungs, sign: int, reach: int, exact: int = 1) -> Moves:
    """`exact`: up to how many rungs the cost is evaluated and not extrapolated from one rung."""
    there = at[:, None] + sign * np.arange(1, reach + 1)
    exists = (there <= space.top[:, None]) & (there >= space.bottom[:, None])
    there = np.where(exists, there, at[:, None])
    here = space.rungs[at]
    units = np.abs(space.rungs[there] - here[:, None])
    value = np.abs(space.worth[there] - space.worth[at][:, None])
    per_unit = np.zeros((len(space.costs), len(at), reach))
    for j in range(reach):
        if j >= exact:
            per_unit[:, :, j] = per_unit[:, :, exact - 1]
            continue
        saved = np.stack([cost.marginals(here, -sign * units[:, j]) for cost in space.costs])
        per_unit[:, :, j] = np.abs(saved) / np.maximum(units[:, j], 1)
    return Moves(units, value, per_unit * units)


def single(moves: Moves, prices: Array) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Rung by rung instead of cumulative: (net, cost [K, …], exists), each [G, M]."""
    net = np.diff(moves.net(prices), axis=1, prepend=0.0)
    cost = np.diff(moves.cost, axis=2, prepend=0.0)
    exists = np.diff(moves.units, axis=1, prepend=0) > 0
    return net, cost, exists
