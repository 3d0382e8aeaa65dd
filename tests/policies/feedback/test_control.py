"""The control policy by itself: statistics in, masks out; no model."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from rig import QUICK, mlp
from torch import Tensor

from controlprune.budget import Budget, Price
from controlprune.control.ramp import Plan
from controlprune.cost.problem import Problem, pose
from controlprune.cost.survey import exact_costs
from controlprune.policies.base import Decision, Observation
from controlprune.policies.feedback.control import Control, ControlLoop
from controlprune.policies.feedback.pace import LOOK
from controlprune.structure import analyse
from controlprune.structure.groups import Structure

SECOND = Plan(earliest=0.015, latest=0.015, deadline=0.015, duration=0.0)  # at step 2 of 100
AT_ONCE = Plan(earliest=0.0, latest=0.0, deadline=0.0, duration=0.0)
SIZES = (32, 24)


@cache
def structure() -> Structure:
    return analyse(mlp(), (torch.zeros(2, 8),))


def problem(budget: Budget | Price | None = None, total_steps: int = 100, seed: int = 0) -> Problem:
    return pose(
        structure(),
        budget or Budget(flops=0.5),
        exact_costs(("flops", "params", "train_flops"), structure()),
        total_steps=total_steps,
        round_to=None,
        batch=16,
        seed=seed,
    )


def seen(loop: ControlLoop, scale: Tensor, steps: int = 40) -> None:
    """Gate gradients of the given scales, mean zero."""
    g = torch.Generator().manual_seed(0)
    for step in range(steps):
        loop.sees(Observation(step, 1.0, scale * torch.randn(sum(SIZES), generator=g)))


def answer(
    loop: ControlLoop,
    step: int,
    masks: tuple[Tensor, ...],
    *,
    norms: Tensor | None = None,
    compact: bool = False,
    final: bool = False,
) -> Decision:
    norms = torch.ones(sum(SIZES)) if norms is None else norms
    seen = Observation(step, 1.0, weigh=lambda: norms, masks=masks, compact=compact, final=final)
    decision = loop.decide(seen)
    assert decision is not None
    return decision


def ones() -> tuple[Tensor, ...]:
    return tuple(torch.ones(n, dtype=torch.bool) for n in SIZES)


def useful(*units: int) -> Tensor:
    """Scales of the gradients: a hundred times larger for `units`, and no two alike."""
    scale = torch.full((sum(SIZES),), 0.01)
    scale[list(units)] = 1.0
    return scale * torch.linspace(1.0, 3.0, sum(SIZES))


def decided(
    control: Control, scale: Tensor, budget: Budget | Price | None = None, *, first: float | None = None
) -> Decision:
    """`first`: norms before the first step, of ones now."""
    loop = control.begin(problem(budget))
    if first is not None:
        loop.units.began(torch.full((sum(SIZES),), first))
    seen(loop, scale)
    answer(loop, 1, ones())
    seen(loop, scale)
    return answer(loop, 2, ones())


def test_the_units_of_least_value_go() -> None:
    keepers = [*range(0, 12), *range(32, 44)]
    decision = decided(replace(QUICK, plan=SECOND, learned=False, dwell=0), useful(*keepers))
    kept = torch.cat(decision.masks)
    assert kept[keepers].all()
    assert not kept.all()
    widths = tuple(int(m.sum()) for m in decision.masks)
    assert 0.48 <= problem().fraction("flops", widths) <= 0.5
    assert decision.reference == {"flops": 0.5}
    assert decision.price["flops"] > 0


def test_a_group_of_little_value_goes_from_a_pretrained_net_and_not_from_one_of_this_run() -> None:
    control, budget = replace(QUICK, plan=SECOND, learned=False, dwell=0), Budget(flops=0.3)
    alike = torch.cat([torch.ones(32), torch.full((24,), 0.3)])
    few = torch.cat([torch.ones(32), torch.full((24,), 1e-3).index_fill(0, torch.tensor([3, 5]), 0.3)])
    own, half, pretrained = (
        int(decided(control, alike, budget, first=first).masks[1].sum()) for first in (0.1, 0.3, 1.0)
    )
    assert own > half > pretrained
    assert pretrained <= problem().floors[1] + 1
    assert decided(control, few, budget, first=1.0).masks[1][[3, 5]].all()


def test_a_stage_at_a_time() -> None:
    plan = Plan(earliest=0.0, latest=0.0, deadline=1.0, duration=0.8)
    control = replace(QUICK, plan=plan, stages=4, update_every=1)
    loop = control.begin(problem())
    masks, references = ones(), []
    for step in range(1, 101):
        loop.sees(Observation(step, 1.0))
        decision = answer(loop, step, masks)
        masks = decision.masks
        references.append(decision.reference["flops"])
    assert set(references) == {1.0, 0.875, 0.75, 0.625, 0.5}
    assert references == sorted(references, reverse=True)


def test_nothing_moves_once_frozen() -> None:
    control = replace(QUICK, plan=AT_ONCE, freeze=0.5, revise_every=1, dwell=0)
    loop = control.begin(problem(total_steps=40))
    seen(loop, useful(*range(20)))
    masks = answer(loop, 10, ones()).masks
    assert loop.wants(20).decision  # the freeze itself
    assert not loop.wants(21).gradients
    seen(loop, useful(*range(36, 56)))
    held = answer(loop, 24, masks).masks
    assert all(torch.equal(a, b) for a, b in zip(masks, held, strict=True))


def test_dormant_units_that_promise_more_come_back() -> None:
    control = replace(QUICK, plan=AT_ONCE, revise_every=1, dwell=0, learned=False)
    loop = control.begin(problem(total_steps=1000))
    seen(loop, useful(*range(12), *range(32, 44)))
    answer(loop, 1, ones())
    masks = answer(loop, 2, ones()).masks
    dormant = torch.nonzero(~masks[0]).flatten()[:2]
    gradient = torch.zeros(sum(SIZES))
    gradient[dormant] = -0.5  # switching on would lower the loss
    for _ in range(200):
        loop.sees(Observation(3, 1.0, gradient))
    answer(loop, 3, masks)
    assert answer(loop, 4, masks).masks[0][dormant].all()


def longing(budget: Budget | Price) -> tuple[ControlLoop, tuple[Tensor, ...], Tensor]:
    """A loop that has just switched units off which now promise more than any other; masks, and which."""
    control = replace(QUICK, plan=AT_ONCE, revise_every=1, dwell=3, update_every=4, learned=False)
    loop = control.begin(problem(budget, total_steps=1000))
    seen(loop, useful(*range(12), *range(32, 44)))
    masks = answer(loop, 4, ones()).masks
    off = torch.nonzero(~torch.cat(masks)).flatten()
    gradient = torch.zeros(sum(SIZES))
    gradient[off] = -0.5
    for _ in range(200):
        loop.sees(Observation(3, 1.0, gradient))
    return loop, masks, off


def test_at_a_price_a_unit_that_moved_dwells_and_few_come_back_at_once() -> None:
    loop, masks, off = longing(Price(flops=1.0))
    for step in (8, 12):
        assert not torch.cat(answer(loop, step, masks).masks)[off].any()
    back = answer(loop, 16, masks).masks
    came = [int((now & ~was).sum()) for was, now in zip(masks, back, strict=True)]
    assert 0 < sum(came) < len(off)
    assert all(n <= size // 16 for n, size in zip(came, SIZES, strict=True))


def test_under_a_budget_any_unit_may_move_at_any_update() -> None:
    loop, masks, off = longing(Budget(flops=0.5))
    assert torch.cat(answer(loop, 8, masks).masks)[off].sum() > len(off) / 2


def test_finalize_enforces_the_budget_and_keeps_masks_that_meet_it() -> None:
    loop = QUICK.begin(problem())
    seen(loop, useful(*range(20)))
    decision = answer(loop, 100, ones(), final=True)
    widths = tuple(int(m.sum()) for m in decision.masks)
    assert 0.48 <= problem().fraction("flops", widths) <= 0.5
    small = tuple(torch.arange(n) < 4 for n in SIZES)
    kept = answer(loop, 100, small, final=True).masks
    assert all(torch.equal(a, b) for a, b in zip(small, kept, strict=True))


def test_under_a_price_units_worth_less_than_they_cost_go() -> None:
    control = replace(QUICK, learned=False, dwell=0)
    cheap, dear = (decided(control, useful(*range(56)) * 0.1, Price(flops=p)) for p in (1e-9, 1e9))
    assert torch.cat(cheap.masks).all()
    assert [int(m.sum()) for m in dear.masks] == list(problem().floors)
    assert dear.reference == {}
    assert dear.price == {"flops": 1e9}


def test_a_price_is_answered_by_every_unit_with_its_own_value() -> None:
    keepers = [*range(12), *range(32, 44)]
    loop = replace(QUICK, learned=False, dwell=0).begin(problem(Price(flops=1.0)))
    seen(loop, useful(*keepers))
    kept = torch.cat(answer(loop, 1, ones()).masks)
    assert not kept.all()
    assert kept[keepers].all()


def test_a_look_lays_dormant_units_out_for_a_few_steps() -> None:
    """And forgets what it knew of them; then the net is small again, with what proved worth it."""
    control = replace(QUICK, plan=AT_ONCE, revise_every=2, update_every=10, dwell=0)
    loop = control.begin(problem(total_steps=10_000))
    seen(loop, useful(*range(12), *range(32, 44)))
    masks = answer(loop, 10, ones()).masks
    step, decision = 20, answer(loop, 20, masks, compact=True)
    while decision.event != "look":
        assert decision.compact
        step += 10
        assert step < 4000  # it comes, where a run is long enough to pay for it
        decision = answer(loop, step, masks, compact=True)
    assert not decision.compact
    assert all(torch.equal(a, b) for a, b in zip(decision.masks, masks, strict=True))
    on = torch.cat(masks)
    assert (loop.units.moments.count[~on] == 0).all()
    assert (loop.units.moments.count[on] > 0).all()
    returning = torch.nonzero(~masks[0]).flatten()[:2]
    gradient = torch.zeros(sum(SIZES))
    gradient[returning] = -100.0
    for ahead in range(1, LOOK + 1):
        assert loop.wants(step + ahead).gradients
        loop.sees(Observation(step + ahead, 1.0, gradient))
    assert loop.wants(step + LOOK).decision
    back = answer(loop, step + LOOK, masks)
    assert back.compact
    assert back.masks[0][returning].all()


def test_no_look_where_peak_memory_is_the_budget() -> None:
    loop = replace(QUICK, plan=AT_ONCE, revise_every=1, update_every=10).begin(problem(total_steps=10_000))
    seen(loop, useful(*range(20)))
    answer(loop, 10, ones())
    masks = answer(loop, 20, ones()).masks
    assert loop.reference.level == 0.0
    loop.updates += 1
    loop.problem = replace(loop.problem, budget={"memory": 0.5})
    assert loop._until_revision(masks, compact=True) == math.inf
    assert loop._until_revision(masks, compact=False) <= 0.0  # all are in the tensors anyway


def test_nothing_is_observed_once_no_unit_will_move() -> None:
    """At the budget, when the next look would come after the freeze; another budget wakes it."""
    short, long = (
        replace(QUICK, plan=AT_ONCE, looks=0.01, update_every=10).begin(problem(total_steps=steps))
        for steps in (200, 10_000)
    )
    for loop in (short, long):
        seen(loop, useful(*range(20)))
        assert loop.wants(5).gradients
        answer(loop, 20, answer(loop, 10, ones()).masks, compact=True)
        assert loop.reference.level == 0.0
    assert not short.wants(25).gradients
    assert short.wants(30).decision
    assert long.wants(25).gradients
    short.retarget(problem(Budget(flops=0.3), total_steps=200))
    assert short.wants(25).gradients


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**70])
def test_a_loss_of_another_scale_decides_alike(factor: float) -> None:
    plain, scaled = (decided(replace(QUICK, plan=SECOND), useful(*range(20)) * f) for f in (1.0, factor))
    assert all(torch.equal(a, b) for a, b in zip(plain.masks, scaled.masks, strict=True))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_saved_loop_decides_the_same(seed: int) -> None:
    control = replace(QUICK, plan=AT_ONCE, revise_every=1, dwell=0)
    loop, other = control.begin(problem(seed=seed)), control.begin(problem(seed=5))
    seen(loop, useful(*range(20)))
    masks = answer(loop, 1, ones()).masks
    other.load_state_dict(loop.state_dict())
    for one in (loop, other):
        seen(one, useful(*range(10, 50)))
    a, b = (answer(one, 2, masks) for one in (loop, other))
    assert all(torch.equal(x, y) for x, y in zip(a.masks, b.masks, strict=True))
    assert a.price == b.price
