"""The search over widths behind allocate/knapsack.py: balance, greedy steps, swaps, a window, finer steps.

State is a rung of allowed widths per group; ΔV, ΔC_k, ΔN are what a move changes (allocate/moves.py).

- balance: rungs with ΔN per weighed ΔC ≥ t in every group, t bisected; ΔC re-evaluated a few times.
- down, while a limit is exceeded: smallest ΔN per Σ_k ΔC_k / excess_k (over exceeded limits) first;
  without an exceeded limit, while ΔN < 0.
- up, while something fits: largest ΔN ≥ 0 per Σ_k ΔC_k / slack_k first.
- swap: a up by i rungs, b down by j, the largest gain ΔN_a − ΔN_b > 0 that fits. Judged by separate
  marginals, which overstates the cost (positive coefficients: C(n + a − b) ≤ C + ΔC_a − ΔC_b), so a
  swap found is feasible.
- window: all width vectors within ± w rungs in a few groups, best by (lands within `tolerance` of a
  limit, objective); at last, where none lands and no finer step is left, the best of the fullest.

While far from the limit a round of down or up takes a block of moves (an eighth of what is missing, at
most 8 rungs a group), near it one. V is concave, so a block takes a prefix of each group's rungs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from ..cost.grid import ascending
from .moves import Array, Moves, Rungs, Space, moves_from, single

__all__ = ["search"]

LOOKAHEAD = 8  # rungs of a group one round may take
SHARE = 1 / 8  # of the excess or slack one round may take
CANDIDATES = 32  # moves of each direction that are paired in a swap
WINDOW = 8192  # width vectors enumerated at once (fewer where the polynomials are long)
ROUNDS = 6  # evaluations of the costs in `balance`
WORK = 100_000  # width vectors × terms evaluated in one window


def _block(score: Array, burden: Array, possible: NDArray[np.bool_]) -> Rungs:
    """How many rungs of each group the round takes: lowest scores first, up to SHARE of the burden."""
    flat = np.flatnonzero(possible)
    ranked = flat[np.argsort(score.ravel()[flat], kind="stable")]
    count = max(1, int(np.searchsorted(np.cumsum(burden.ravel()[ranked]), SHARE, side="right")))
    return np.bincount(ranked[:count] // score.shape[1], minlength=len(score)).astype(np.int64)


def balance(space: Space) -> Rungs:
    """Near the best state, from the first-order condition alone: ΔV per unit ≥ t c_g in every group.

    c_g weighs the resources by how much of their limits they use; t is bisected until the limits hold,
    then c is evaluated at the widths found (damped: geometric mean), a few times.
    """
    step = np.maximum(np.diff(space.rungs, prepend=0), 1)
    density = np.diff(space.worth, prepend=0.0) / step
    density[space.bottom] = np.inf
    group = np.repeat(np.arange(len(space.top)), np.diff(space.start))
    limited = np.isfinite(space.limits)
    ones = np.ones(len(space.top))
    at, last = space.top, None
    for _ in range(ROUNDS):
        unit = np.stack([cost.marginals(space.rungs[at], ones) for cost in space.costs])
        unit = unit if last is None else np.sqrt(unit * last)
        last = unit
        net = density - (space.prices @ unit)[group]
        share = space.resources(at)[limited] / np.maximum(space.limits[limited], 1e-300)
        weight = share**4 / np.maximum(space.limits[limited], 1e-300)
        burden = weight / max(weight.sum(), 1e-300) @ unit[limited] if limited.any() else ones
        score = net / np.maximum(burden, 1e-300)[group]
        before, at = at, _threshold(space, np.where(net < 0, -np.inf, score))
        if (before == at).all():
            break
    return at


def _threshold(space: Space, score: Array) -> Rungs:
    """The state of all rungs with score ≥ t, for the least t ≥ 0 that meets every limit."""

    def state(t: float) -> Rungs:
        return space.bottom + np.add.reduceat(score >= t, space.start[:-1], dtype=np.int64) - 1

    everything = state(0.0)
    if (space.resources(everything) <= space.limits).all():
        return everything
    ladder = ascending(score[np.isfinite(score)])
    low, high = 0, len(ladder)  # state(ladder[low]) does not meet the limits; state(ladder[high]) does
    while high - low > 1:
        middle = (low + high) // 2
        meets = (space.resources(state(ladder[middle])) <= space.limits).all()
        low, high = (low, middle) if meets else (middle, high)
    return state(ladder[high]) if high < len(ladder) else space.bottom


def down(space: Space, at: Rungs) -> Rungs:
    """Give up rungs until every limit is met and no rung costs more than it is worth."""
    while True:
        excess = space.resources(at) - space.limits
        net, cost, exists = single(moves_from(space, at, -1, LOOKAHEAD), space.prices)
        over = excess > 0
        if over.any():
            burden = np.tensordot(1 / excess[over], cost[over], axes=1)
            possible = exists & (burden > 0)
        else:
            burden = np.full(net.shape, SHARE / max(1.0, np.sqrt(net.size)))
            possible = exists & (net < 0)
        if not possible.any():
            return at
        score = net / np.where(burden > 0, burden, 1.0)
        at = at - _block(score, burden, possible)


def up(space: Space, at: Rungs) -> Rungs:
    """Take on rungs while one fits and is worth its price."""
    while True:
        slack = space.limits - space.resources(at)
        net, cost, exists = single(moves_from(space, at, 1, LOOKAHEAD), space.prices)
        fits = (cost <= np.maximum(slack, 0)[:, None, None]).all(axis=0)
        possible = exists & (net >= 0) & np.logical_and.accumulate(fits, axis=1)
        if not possible.any():
            return at
        tight = np.isfinite(slack) & (slack > 0)
        burden = np.tensordot(1 / slack[tight], cost[tight], axes=1)
        score = -net / np.where(burden > 0, burden, 1e-300)
        taken = _block(score, burden if tight.any() else np.full(net.shape, SHARE / 4), possible)
        block = at + taken
        if (space.resources(block) > space.limits).any():
            first = np.where(possible[:, 0], score[:, 0], np.inf)
            block = at + np.eye(len(at), dtype=np.int64)[np.argmin(first)]
        at = block


def swap(space: Space, at: Rungs) -> Rungs | None:
    """The best exchange of one group's rungs for another's, or None."""
    rise, fall = moves_from(space, at, 1, 2, exact=2), moves_from(space, at, -1, 4, exact=4)
    slack = space.limits - space.resources(at)
    scale = 1 / np.where(np.isfinite(space.limits), np.maximum(space.limits, 1), np.inf)
    ups = _promising(rise, space.prices, scale, best=True)
    downs = _promising(fall, space.prices, scale, best=False)
    gain = rise.net(space.prices).ravel()[ups][:, None] - fall.net(space.prices).ravel()[downs][None]
    use = [
        c.ravel()[ups][:, None] - d.ravel()[downs][None] for c, d in zip(rise.cost, fall.cost, strict=True)
    ]
    fits = np.all([u <= s for u, s in zip(use, slack, strict=True)], axis=0)
    fits &= (ups // 2)[:, None] != (downs // 4)[None]
    gain = np.where(fits, gain, -np.inf)
    if not gain.size or gain.max() <= 1e-12 * max(1.0, abs(space.worth[at].sum())):
        return None
    a, b = np.unravel_index(int(gain.argmax()), gain.shape)
    out = at.copy()
    out[ups[a] // 2] += ups[a] % 2 + 1
    out[downs[b] // 4] -= downs[b] % 4 + 1
    return out


def _promising(moves: Moves, prices: Array, scale: Array, best: bool) -> NDArray[np.intp]:
    """Flat indices of the moves with the most (or least) net value per share of the limits."""
    exists = np.flatnonzero(moves.units)
    cost = np.tensordot(scale, moves.cost, axes=1).ravel()[exists]
    score = moves.net(prices).ravel()[exists] / np.maximum(cost, 1e-300)
    return exists[np.argsort(-score if best else score, kind="stable")[:CANDIDATES]]


def window(space: Space, at: Rungs, *, fullest: bool = False) -> Rungs:
    """The best state within a window of rungs around `at` (all of the space, if it is small).

    `fullest`: where none lands, of those that use the most.
    """
    room = _room(space)
    chosen = _marginal_groups(space, at, room)
    if not len(chosen):  # every group is held where it is
        return at
    bottom, top = space.bottom[chosen], space.top[chosen]
    reach = int((top - bottom).max())
    while reach > 1 and np.log(np.minimum(2.0 * reach + 1, top - bottom + 1)).sum() > np.log(room):
        reach -= max(1, reach // 16)
    low = np.maximum(at[chosen] - reach, bottom)
    axes = [np.arange(a, b + 1) for a, b in zip(low, np.minimum(at[chosen] + reach, top), strict=True)]
    states = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(chosen))
    widths = np.repeat(space.rungs[at][None], len(states), axis=0)
    widths[:, chosen] = space.rungs[states]
    resources = np.stack([cost.values(widths) for cost in space.costs], axis=-1)
    objective = space.worth[states].sum(axis=-1) - resources @ space.prices
    feasible = (resources <= space.limits).all(axis=-1)
    landed = feasible & space.landed(resources)
    allowed = landed if landed.any() else feasible
    if not allowed.any():
        return at
    if fullest and not landed.any():
        slack = ((space.limits - resources) / space.dense).min(axis=-1)
        allowed &= slack <= slack[allowed].min() + np.min(space.tolerance)
    tie = 1e-12 * max(1.0, float(np.abs(objective).max()))
    best = np.flatnonzero(allowed & (objective >= objective[allowed].max() - tie))
    out = at.copy()
    out[chosen] = states[best[np.argmax((resources[best] / space.dense).sum(axis=-1))]]
    return out


def _room(space: Space) -> int:
    """How many width vectors may be enumerated at once."""
    terms = sum(len(cost.coefficients) for cost in space.costs)
    return min(WINDOW, max(243, WORK // max(1, terms)))


def _marginal_groups(space: Space, at: Rungs, room: int) -> NDArray[np.intp]:
    """Groups to enumerate: all, or those with the cheapest next rung down and the best one up."""
    if len(at) * np.log(3) <= np.log(room):
        return np.arange(len(at))
    most = 6 if room >= 3**6 else 4
    scale = 1 / space.dense
    downs = _promising(moves_from(space, at, -1, 1), space.prices, scale, best=False)
    ups = _promising(moves_from(space, at, 1, 1), space.prices, scale, best=True)
    both = [g for pair in zip_longest(downs, ups) for g in pair if g is not None]
    return np.array(sorted(dict.fromkeys(both[:most])), dtype=np.intp)


def polish(space: Space, at: Rungs) -> Rungs:
    """Fill, swap while it gains, then enumerate windows while that gains."""
    at = up(space, at)
    for _ in range(2 * CANDIDATES):
        swapped = swap(space, at)
        if swapped is None:
            break
        at = up(space, swapped)
    for _ in range(8):
        better = window(space, at)
        if space.rank(better) <= space.rank(at):
            return better
        at = up(space, better)
    return at


def search(space: Space, current: Rungs, coarsest: int, grains: Sequence[int]) -> tuple[Space, Rungs]:
    """The best state found, and the search space with the rungs that were added on the way.

    Finer rungs are multiples of `grains`, one per group.
    """
    if np.log(space.top - space.bottom + 1).sum() <= np.log(_room(space)):
        at = window(space, space.bottom)  # all of the space
    else:
        starts = [balance(space)]
        if (current < space.rungs[space.top]).any():
            starts.append(down(space, space.nearest(current)))
        at = max((polish(space, start) for start in starts), key=space.rank)
    step = coarsest // 2
    while step >= 1 and not space.landed(space.resources(at)):
        widths = space.rungs[at]
        space = _finer(space, widths, step, grains)
        at = _last_move(space, space.nearest(widths))
        step //= 2
    if not space.landed(space.resources(at)):
        at = window(space, at, fullest=True)
    return space, at


def _finer(space: Space, widths: Rungs, step: int, grains: Sequence[int]) -> Space:
    """Rungs at multiples of `step`, and of the grain, between each width and the rung above it."""
    ladders = []
    for rungs, n, grain in zip(space.ladders, widths, grains, strict=True):
        fine = -(-step // grain) * grain
        above = rungs[rungs > n][:1]
        between = [np.arange(n - n % fine + fine, m, fine) for m in above]
        ladders.append(ascending(np.concatenate([rungs, *between])))
    return Space.of(
        ladders, space.curves, space.costs, space.limits, space.prices, space.dense, space.tolerance
    )


def _last_move(space: Space, at: Rungs) -> Rungs:
    """Single groups up by finer steps, most valuable first, only until the limit is near enough."""
    for _ in range(len(at)):
        resources = space.resources(at)
        if space.landed(resources):
            return at
        moves = moves_from(space, at, 1, LOOKAHEAD, exact=LOOKAHEAD)
        after = resources[:, None, None] + moves.cost
        fits = (moves.units > 0) & (after <= space.limits[:, None, None]).all(axis=0)
        if not fits.any():
            return at
        lands = fits & space.landed(np.moveaxis(after, 0, -1))
        share = (moves.cost / space.dense[:, None, None]).max(axis=0)
        score = np.where(lands, moves.value, -np.inf) if lands.any() else np.where(fits, share, -np.inf)
        g, j = np.unravel_index(int(score.argmax()), score.shape)
        at = at.copy()
        at[g] += j + 1
    return at
