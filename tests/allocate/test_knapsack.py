"""The trade-off solver against brute force, and the properties its callers rely on."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from controlprune.allocate import search as search_module
from controlprune.allocate.knapsack import Tradeoff, solve
from controlprune.allocate.uniform import uniform
from controlprune.budget import InfeasibleBudget
from controlprune.cost.grid import ladder
from controlprune.cost.polynomial import Polynomial
from controlprune.cost.problem import feasible_range
from controlprune.structure.extents import Concat, Fixed, Product, Units

INF = float("inf")


def chain(sizes: tuple[int, ...], ends: tuple[int, int] = (16, 10)) -> Polynomial:
    """FLOPs of an MLP with these hidden widths."""
    dims = [Fixed(ends[0]), *(Units(g, n) for g, n in enumerate(sizes)), Fixed(ends[1])]
    return Polynomial.of([(2.0, pair) for pair in itertools.pairwise(dims)], len(sizes))


def rows(sizes: tuple[int, ...]) -> Polynomial:
    """A second, linear resource."""
    return Polynomial.of([(g + 1.0, (Units(g, n),)) for g, n in enumerate(sizes)], len(sizes))


def random_values(sizes: tuple[int, ...], seed: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return tuple(rng.exponential(size=n) * rng.lognormal(sigma=0.7) for n in sizes)


def problem(sizes, values, fraction=0.5, step=1, price=0.0, costs=None, **changes) -> Tradeoff:
    costs = costs or (chain(sizes),)
    dense = np.array([cost.value(sizes) for cost in costs])
    return Tradeoff(
        values=values,
        costs=costs,
        limits=dense * fraction,
        prices=np.full(len(costs), price) / dense,
        floors=tuple(1 for _ in sizes),
        steps=tuple(step for _ in sizes),
        **changes,
    )


def brute_force(p: Tradeoff) -> float:
    """Best objective over every width vector, landing not asked for."""
    rungs = [ladder(n, f, s) for n, f, s in zip(p.sizes, p.floors, p.steps, strict=True)]
    grid = np.stack(np.meshgrid(*rungs, indexing="ij"), axis=-1).reshape(-1, len(rungs))
    worth = np.zeros(len(grid))
    for column, v in zip(grid.T, p.values, strict=True):
        worth += np.concatenate([[0], np.cumsum(np.sort(np.maximum(v, 0))[::-1])])[column]
    used = np.stack([cost.values(grid) for cost in p.costs], axis=-1)
    objective = worth - used @ p.prices
    return float(objective[(used <= p.limits).all(axis=-1)].max())


sizes_strategy = st.lists(st.integers(2, 24), min_size=1, max_size=4).map(tuple)


@settings(max_examples=60, deadline=None)
@given(
    sizes_strategy,
    st.integers(0, 10**6),
    st.floats(0.05, 1),
    st.integers(1, 5),
    st.sampled_from([0, 0, 30.0]),
)
def test_small_problems_are_solved_exactly(sizes, seed, fraction, step, price) -> None:
    p = problem(sizes, random_values(sizes, seed), fraction, step, price, tolerance=INF)
    assume(p.costs[0].value(p.floors) <= p.limits[0])
    assume(np.prod([len(ladder(n, 1, step)) for n in sizes]) <= search_module.WINDOW)
    solution = solve(p)
    assert solution.objective == pytest.approx(brute_force(p), rel=1e-9)
    assert (solution.costs <= p.limits).all()


@pytest.mark.parametrize("seed", range(25))
def test_greedy_is_close_to_brute_force(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of at most 243 width vectors, on problems of 10⁴ to 10⁵: within 1 % of the best value."""
    monkeypatch.setattr(search_module, "WINDOW", 243)
    rng = np.random.default_rng(seed)
    sizes = tuple(int(n) for n in rng.integers(8, 20, size=4))
    two = (chain(sizes), rows(sizes))
    p = problem(
        sizes,
        random_values(sizes, seed),
        rng.uniform(0.1, 0.9, size=2),
        costs=two,
        price=rng.choice([0, 5.0]),
    )
    solution = solve(p)
    assert (solution.costs <= p.limits).all()
    best = brute_force(p)
    assert best - solution.objective <= 0.01 * abs(best)


@settings(max_examples=40, deadline=None)
@given(sizes_strategy, st.integers(0, 10**6), st.floats(0.02, 1.0), st.integers(1, 16), st.data())
def test_always_feasible_and_consistent(sizes, seed, fraction, step, data) -> None:
    """Whatever dormant units are held; masks have the widths, widths are allowed, limits hold."""
    rng = np.random.default_rng(seed)
    values = tuple(v - 0.3 for v in random_values(sizes, seed))
    masks = tuple(rng.random(n) < 0.6 for n in sizes)
    shares = [data.draw(st.sampled_from([0.0, 0.4, 1.0])) for _ in sizes]
    held = tuple(~m & (rng.random(len(m)) < share) for m, share in zip(masks, shares, strict=True))
    p = problem(sizes, values, fraction, step, masks=masks, held=held, hysteresis=0.1)
    if p.costs[0].value(p.floors) > p.limits[0]:
        with pytest.raises(InfeasibleBudget):
            solve(p)
        return
    solution = solve(p)
    assert tuple(int(m.sum()) for m in solution.masks) == solution.widths
    assert solution.costs[0] == p.costs[0].value(solution.widths) <= p.limits[0]
    assert all(1 <= n <= size for n, size in zip(solution.widths, sizes, strict=True))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(2, 16), min_size=1, max_size=3).map(tuple), st.integers(0, 10**6))
def test_use_falls_as_the_price_rises(sizes, seed) -> None:
    values = random_values(sizes, seed)
    used = [
        solve(problem(sizes, values, INF, price=price)).costs[0] for price in (0, 1.0, 5.0, 20.0, 100.0, 1e6)
    ]
    assert all(a >= b for a, b in itertools.pairwise(used))
    assert used[0] == chain(sizes).value(sizes)
    assert used[-1] == chain(sizes).value([1] * len(sizes))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(2, 14), min_size=1, max_size=3).map(tuple), st.integers(0, 10**6))
def test_hysteresis_settles(sizes, seed) -> None:
    """Solving again from the solution changes nothing (proof: exchange argument on the bonus)."""
    assume(chain(sizes).value([1] * len(sizes)) <= 0.5 * chain(sizes).value(sizes))
    values = random_values(sizes, seed)
    rng = np.random.default_rng(seed)
    masks = tuple(rng.random(n) < 0.5 for n in sizes)
    first = solve(problem(sizes, values, 0.5, tolerance=INF, hysteresis=0.3, masks=masks))
    again = solve(problem(sizes, values, 0.5, tolerance=INF, hysteresis=0.3, masks=first.masks))
    assert all(np.array_equal(a, b) for a, b in zip(first.masks, again.masks, strict=True))


@pytest.mark.parametrize("sizes", [(304, 104), (300, 100), (32, 64, 128), (32, 64, 128, 128)])
@pytest.mark.parametrize("fraction", [0.2, 0.35, 0.5, 0.65, 0.8])
def test_lands_under_the_limit(sizes, fraction) -> None:
    """Coarse steps of 8: never over, at most 1.5 points of dense under."""
    for seed in range(3):
        p = problem(sizes, random_values(sizes, seed), fraction, 8, costs=(chain(sizes, (64, 10)),))
        realised = solve(p).costs[0] / chain(sizes, (64, 10)).value(sizes)
        assert fraction - 0.015 <= realised <= fraction


def test_finer_steps_only_where_needed() -> None:
    """One group of 64 in steps of 32: only 30 units come under 0.47, and one finer step finds them."""
    p = problem((64,), (np.arange(64.0) + 1,), 0.47, 32)
    assert solve(p).widths == (30,)
    assert solve(problem((64,), (np.arange(64.0) + 1,), 0.5, 32)).widths == (32,)


def test_the_best_units_stay() -> None:
    values = (np.array([0.1, 3.0, -1.0, 2.0, 0.5, 0.0]),)
    solution = solve(problem((6,), values, 0.5))
    assert solution.masks[0].tolist() == [False, True, False, True, True, False]
    assert solution.objective == 5.5


def test_dormant_units_return_when_they_are_worth_it() -> None:
    values = (np.array([1.0, 1.0, 5.0, 1.05]),)
    current = (np.array([True, True, False, False]),)
    p = problem((4,), values, 0.5, masks=current, hysteresis=0.1)
    assert solve(p).masks[0].tolist() == [True, False, True, False]


def test_held_units_keep_their_state() -> None:
    values = (np.array([1.0, 2.0, 3.0, 4.0]),)
    current = (np.array([True, True, False, False]),)
    everything = (np.ones(4, bool),)
    for price in (0.0, 100.0):
        held = solve(problem((4,), values, INF, price=price, masks=current, held=everything))
        assert held.masks[0].tolist() == [True, True, False, False]
    dormant = (~current[0],)
    tight = solve(problem((4,), values, 0.25, masks=current, held=dormant))
    assert tight.masks[0].tolist() == [False, True, False, False]


def test_negative_values_count_as_zero() -> None:
    values = (np.array([-1.0, -2.0, 3.0, -0.5]),)
    assert solve(problem((4,), values, 1.0)).widths == (4,)
    assert solve(problem((4,), values, INF, price=0.01)).masks[0].tolist() == [False, False, True, False]


def test_two_limits_are_both_met() -> None:
    sizes = (40, 60, 20)
    costs = (chain(sizes), rows(sizes))
    for fractions in [(0.3, 0.9), (0.9, 0.3), (0.4, 0.5)]:
        p = problem(sizes, random_values(sizes, 3), np.array(fractions), 4, costs=costs)
        solution = solve(p)
        assert (solution.costs <= p.limits).all()
        assert (solution.costs >= p.limits - 0.015 * np.array([c.value(sizes) for c in costs])).any()


def test_shadow_price_is_the_loss_per_resource() -> None:
    """One group, V(n) = Σ (100 − j): the price of a unit of cost 26 n lies between the next two values."""
    values = (np.arange(100.0, 0, -1),)
    p = problem((100,), values, 0.4)
    cost = p.costs[0].marginal([40], 0, 1)
    assert 60 / cost <= solve(p).prices[0] <= 61 / cost
    assert solve(problem((100,), values, 1.0)).prices[0] == 0
    # the same price in place of the limit gives the same net
    priced = problem((100,), values, INF, price=solve(p).prices[0] * p.costs[0].value([100]))
    assert solve(priced).widths == (40,)


def test_hundreds_of_groups() -> None:
    """No loop per unit: 200 groups of 1000 units, feasible and filled."""
    sizes = (1000,) * 200
    solution = solve(problem(sizes, random_values(sizes, 0), 0.37, 8))
    dense = chain(sizes).value(sizes)
    assert 0.365 * dense <= solution.costs[0] <= 0.37 * dense


def test_many_groups_that_are_all_held() -> None:
    """Nothing can move, and nothing lands: the widths are what they were."""
    sizes = (6,) * 12
    masks = [np.arange(6) < 3 for _ in sizes]
    held = [np.ones(6, dtype=bool) for _ in sizes]
    found = solve(problem(sizes, random_values(sizes, 0), 0.9, masks=masks, held=held))
    assert found.widths == (3,) * 12


def test_infeasible_says_what_is_feasible() -> None:
    sizes = (20, 30)
    least, dense = feasible_range((chain(sizes),), (1, 1), sizes)[0]
    assert (least, dense) == (chain(sizes).value([1, 1]), chain(sizes).value(sizes))
    with pytest.raises(InfeasibleBudget, match="flops") as caught:
        solve(problem(sizes, random_values(sizes, 0), 1e-3, resources=("flops",)))
    assert caught.value.ranges == {"flops": (least, dense)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": (np.array([1.0, np.nan]),)}, "not finite"),
        ({"floors": (-1,)}, "floor=-1"),
        ({"floors": (3,)}, "floor=3"),
        ({"steps": (0,)}, "step=0"),
        ({"limits": np.array([np.nan])}, "limits"),
        ({"prices": np.array([-1.0])}, "prices"),
        ({"hysteresis": -0.1}, "hysteresis"),
        ({"steps": (1, 1)}, "steps: 2 entries for 1"),
        ({"values": (), "floors": (), "steps": ()}, "no group"),
    ],
)
def test_bad_problems_are_refused(changes, message) -> None:
    arguments = {
        "values": (np.ones(2),),
        "costs": (chain((2,)),),
        "limits": np.array([INF]),
        "prices": np.zeros(1),
        "floors": (1,),
        "steps": (1,),
    }
    with pytest.raises(ValueError, match=message):
        Tradeoff(**(arguments | changes))


@settings(max_examples=40, deadline=None)
@given(sizes_strategy, st.floats(0.05, 1), st.integers(1, 6))
def test_uniform_is_one_fraction_and_fills_the_limit(sizes, fraction, step) -> None:
    """Feasible; no group further than a rung from f·N; none below it that could take its next rung."""
    cost = chain(sizes)
    ones = [1] * len(sizes)
    limit = fraction * cost.value(sizes)
    assume(cost.value(ones) <= limit)
    widths = uniform(sizes, (cost,), [limit], ones, [step] * len(sizes))
    assert cost.value(widths) <= limit
    fractions = np.linspace(0, 1, 20001)
    used = cost.values(np.maximum(1, fractions[:, None] * np.array(sizes)))
    even = np.maximum(1, fractions[np.flatnonzero(used <= limit)[-1]] * np.array(sizes))
    ladders = [ladder(n, 1, step) for n in sizes]
    for g, (rungs, n, middle) in enumerate(zip(ladders, widths, even, strict=True)):
        slack = 1e-3 * sizes[g]
        assert rungs[rungs <= max(1, middle - slack)].max() <= n
        assert n <= rungs[rungs >= min(middle + slack, sizes[g])].min()
        if n < middle - slack:
            above = [m if h != g else rungs[rungs > n][0] for h, m in enumerate(widths)]
            assert cost.value(above) > limit


def test_uniform_lands_near_the_limit() -> None:
    """Groups of proportional size and coarse steps: all rungs change at the same fraction."""
    sizes = (32, 64, 128)
    cost = chain(sizes, (64, 10))
    for fraction in (0.2, 0.35, 0.5, 0.65, 0.8):
        widths = uniform(sizes, (cost,), [fraction * cost.value(sizes)], (2, 4, 8), (2, 4, 8))
        assert fraction - 0.05 <= cost.value(widths) / cost.value(sizes) <= fraction


def test_few_groups_in_a_long_polynomial() -> None:
    """A cost of many terms narrows the window; a small problem is then searched, not cut off."""
    sizes = (60, 50)
    terms = [(1.0, (Units(0, 60), Fixed(2), Units(1, 50)))]
    terms += [
        (1.0 + k, (Units(k % 2, 0), Product((Fixed(3), Concat((Fixed(k), Units(1, 50)))))))
        for k in range(900)
    ]
    cost = Polynomial.of(terms, 2)
    assert len(cost.coefficients) * search_module.WINDOW > search_module.WORK * 4
    p = problem(sizes, random_values(sizes, 0), 0.6, costs=(cost,))
    solution = solve(p)
    assert p.limits[0] * 0.975 <= solution.costs[0] <= p.limits[0]
    assert solution.objective >= 0.99 * brute_force(p)
