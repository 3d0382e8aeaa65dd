"""The control policy by itself: statistics in, masks out; no model."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Literal

import pytest
import torch
from rig import QUICK, mlp
from torch import Tensor

from controlprune.budget import Budget, Price
from controlprune.control.ramp import Plan
from controlprune.cost.problem import make_setting
from controlprune.cost.survey import exact_costs
from controlprune.policies.base import Decision, Setting
from controlprune.policies.feedback.control import Control, ControlLoop
from controlprune.saliency.trust import by_norm
from controlprune.structure import analyse
from controlprune.structure.groups import Structure

SECOND = Plan(earliest=0.015, latest=0.015, deadline=0.015, duration=0.0)  # at step 2 of 100
AT_ONCE = Plan(earliest=0.0, latest=0.0, deadline=0.0, duration=0.0)
SIZES = (32, 24)


@cache
def structure() -> Structure:
    return analyse(mlp(), (torch.zeros(2, 8),))


def setting(budget: Budget | Price | None = None, total_steps: int = 100, seed: int = 0) -> Setting:
    return make_setting(
        structure(),
        budget or Budget(flops=0.5),
        exact_costs(("flops", "params", "train_flops"), structure()),
        total_steps=total_steps,
        round_to=None,
        batch=16,
        seed=seed,
    )


def seen(loop: ControlLoop, scale: Tensor, steps: int = 40, norms: Tensor | None = None) -> None:
    """Gate gradients of the given scales, mean zero."""
    norms = torch.ones(sum(SIZES)) if norms is None else norms
    g = torch.Generator().manual_seed(0)
    for step in range(steps):
        loop.observe(scale * torch.randn(sum(SIZES), generator=g), norms)
        loop.watch(step, 1.0)


def ones() -> tuple[Tensor, ...]:
    return tuple(torch.ones(n, dtype=torch.bool) for n in SIZES)


def useful(*units: int) -> Tensor:
    """Scales of the gradients: a hundred times larger for `units`, and no two alike."""
    scale = torch.full((sum(SIZES),), 0.01)
    scale[list(units)] = 1.0
    return scale * torch.linspace(1.0, 3.0, sum(SIZES))


def decided(control: Control, scale: Tensor, budget: Budget | Price | None = None) -> Decision:
    loop = control.begin(setting(budget))
    seen(loop, scale)
    loop.decide(1, ones(), False)
    seen(loop, scale)
    return loop.decide(2, ones(), False)


def test_the_units_of_least_value_go() -> None:
    keepers = [*range(0, 12), *range(32, 44)]
    decision = decided(replace(QUICK, plan=SECOND, learned=False, dwell=0), useful(*keepers))
    kept = torch.cat(decision.masks)
    assert kept[keepers].all()
    assert not kept.all()
    widths = tuple(int(m.sum()) for m in decision.masks)
    assert 0.48 <= setting().fraction("flops", widths) <= 0.5
    assert decision.reference == {"flops": 0.5}
    assert decision.price["flops"] > 0


@pytest.mark.parametrize("keep", ["norm", "value"])
def test_the_norm_of_its_readers_says_whether_a_unit_stays(keep: Literal["norm", "value"]) -> None:
    """The values say how many, and which only where asked to."""
    control = replace(QUICK, plan=SECOND, learned=False, dwell=0, keep=keep)
    strong, worthy = torch.arange(sum(SIZES)) % 2 == 0, torch.arange(sum(SIZES)) % 2 == 1
    loop, kept = control.begin(setting()), torch.cat(ones())
    for step in (1, 2):
        seen(loop, useful(*torch.nonzero(worthy).flatten().tolist()), norms=1.0 + strong)
        kept = torch.cat(loop.decide(step, ones(), False).masks)
    wanted = strong if keep == "norm" else worthy
    for mask, best in zip(kept.split(list(SIZES)), wanted.split(list(SIZES)), strict=True):
        assert (mask <= best).all() or (best <= mask).all()
    assert 0 < kept.sum() < len(kept)


def test_by_norm_hands_the_values_of_a_group_to_its_active_units() -> None:
    values = torch.tensor([5.0, 1.0, 3.0, 2.0, 10.0, 20.0, 30.0])
    norms = torch.tensor([1.0, 9.0, 4.0, 100.0, 7.0, 7.0, 1.0])
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    on = torch.tensor([True, True, True, False, True, True, True])
    found = by_norm(values, norms, group, on)
    assert found.tolist() == [1.0, 5.0, 3.0, 2.0, 20.0, 30.0, 10.0]  # dormant: its own; equal norms: by value
    assert by_norm(values, torch.ones(7), group, on).tolist() == values.tolist()


def test_without_trust_the_widths_are_the_uniform_ones() -> None:
    """Values then say which units of a group stay, not how many."""
    control = replace(QUICK, plan=SECOND, learned=False, dwell=0, trust=0.0)
    one_sided = decided(control, useful(*range(32)))  # the first group is worth all
    other = decided(control, useful(*range(32, 56)))
    assert [int(m.sum()) for m in one_sided.masks] == [int(m.sum()) for m in other.masks]
    trusting = replace(control, trust=1.0)
    wide, narrow = (decided(trusting, useful(*r)) for r in (range(32), range(32, 56)))
    assert wide.masks[0].sum() > narrow.masks[0].sum()


def test_a_stage_at_a_time() -> None:
    plan = Plan(earliest=0.0, latest=0.0, deadline=1.0, duration=0.8)
    control = replace(QUICK, plan=plan, stages=4, update_every=1)
    loop = control.begin(setting())
    masks, references = ones(), []
    for step in range(1, 101):
        loop.watch(step, 1.0)
        decision = loop.decide(step, masks, False)
        masks = decision.masks
        references.append(decision.reference["flops"])
    assert set(references) == {1.0, 0.875, 0.75, 0.625, 0.5}
    assert references == sorted(references, reverse=True)


def test_nothing_moves_once_frozen() -> None:
    control = replace(QUICK, plan=AT_ONCE, freeze=0.5, revise_every=1, dwell=0)
    loop = control.begin(setting(total_steps=40))
    seen(loop, useful(*range(20)))
    masks = loop.decide(10, ones(), False).masks
    assert loop.wants_decision(20)  # the freeze itself
    assert not loop.wants_gradients(21)
    assert not loop.wants_batch(24)
    seen(loop, useful(*range(36, 56)))
    held = loop.decide(24, masks, False).masks
    assert all(torch.equal(a, b) for a, b in zip(masks, held, strict=True))


def test_dormant_units_that_promise_more_come_back() -> None:
    control = replace(QUICK, plan=AT_ONCE, revise_every=1, dwell=0, learned=False, trust=1.0)
    loop = control.begin(setting(total_steps=1000))
    seen(loop, useful(*range(12), *range(32, 44)))
    loop.decide(1, ones(), False)
    masks = loop.decide(2, ones(), False).masks
    dormant = torch.nonzero(~masks[0]).flatten()[:2]
    gradient = torch.zeros(sum(SIZES))
    gradient[dormant] = -0.5  # switching on would lower the loss
    for _ in range(200):
        loop.observe(gradient, torch.ones(sum(SIZES)))
    loop.decide(3, masks, False)
    assert loop.decide(4, masks, False).masks[0][dormant].all()


def test_a_unit_that_moved_dwells() -> None:
    control = replace(QUICK, plan=AT_ONCE, revise_every=1, dwell=3, update_every=4, learned=False)
    loop = control.begin(setting(total_steps=1000))
    seen(loop, useful(*range(12), *range(32, 44)))
    masks = loop.decide(4, ones(), False).masks
    off = torch.nonzero(~torch.cat(masks)).flatten()
    gradient = torch.zeros(sum(SIZES))
    gradient[off] = -0.5
    for _ in range(200):
        loop.observe(gradient, torch.ones(sum(SIZES)))
    for step in (8, 12):
        again = loop.decide(step, masks, False).masks
        assert not torch.cat(again)[off].any()
    assert torch.cat(loop.decide(16, masks, False).masks)[off].any()


def test_finalize_enforces_the_budget_and_keeps_masks_that_meet_it() -> None:
    loop = QUICK.begin(setting())
    seen(loop, useful(*range(20)))
    decision = loop.last(ones())
    widths = tuple(int(m.sum()) for m in decision.masks)
    assert 0.48 <= setting().fraction("flops", widths) <= 0.5
    small = tuple(torch.arange(n) < 4 for n in SIZES)
    kept = loop.last(small).masks
    assert all(torch.equal(a, b) for a, b in zip(small, kept, strict=True))


def test_under_a_price_units_worth_less_than_they_cost_go() -> None:
    control = replace(QUICK, learned=False, dwell=0)
    cheap, dear = (decided(control, useful(*range(56)) * 0.1, Price(flops=p)) for p in (1e-9, 1e3))
    assert torch.cat(cheap.masks).all()
    assert [int(m.sum()) for m in dear.masks] == list(setting().floors)
    assert dear.reference == {}
    assert dear.price == {"flops": 1e3}


def test_a_price_is_answered_by_every_unit_with_its_own_value() -> None:
    """The norm says which units a limit leaves; under a price nothing says how many but the values."""
    keepers = [*range(12), *range(32, 44)]
    strong = 1.0 + torch.ones(sum(SIZES)).index_fill(0, torch.tensor(keepers), 0.0)
    loop = replace(QUICK, learned=False, dwell=0).begin(setting(Price(flops=1.0)))
    seen(loop, useful(*keepers), norms=strong)
    kept = torch.cat(loop.decide(1, ones(), False).masks)
    assert not kept.all()
    assert kept[keepers].all()


def test_trials_are_small_sets_of_live_units() -> None:
    control = replace(QUICK, calibrate_every=1, trials=6)
    loop = control.begin(setting())
    masks = tuple(torch.arange(n) % 2 == 0 for n in SIZES)
    for compact in (False, True):
        trials = loop.trials(1, masks, compact)
        assert len(trials) == 6
        for trial in trials:
            assert bool((masks[trial.group][trial.units] == trial.off).all())
            assert 1 <= len(trial.units) <= 16
            assert trial.off or not compact
    assert {t.off for t in loop.trials(1, masks, False)} == {True, False}
    assert replace(control, trials=0).begin(setting()).trials(1, masks, False) == []


@pytest.mark.parametrize("seed", [0, 1])
def test_a_saved_loop_decides_the_same(seed: int) -> None:
    control = replace(QUICK, plan=AT_ONCE, revise_every=1, dwell=0)
    loop, other = control.begin(setting(seed=seed)), control.begin(setting(seed=5))
    seen(loop, useful(*range(20)))
    masks = loop.decide(1, ones(), False).masks
    other.load_state_dict(loop.state_dict())
    for one in (loop, other):
        seen(one, useful(*range(10, 50)))
    a, b = (one.decide(2, masks, False) for one in (loop, other))
    assert all(torch.equal(x, y) for x, y in zip(a.masks, b.masks, strict=True))
    assert a.price == b.price
    assert [t.units.tolist() for t in loop.trials(3, masks, False)] == [
        t.units.tolist() for t in other.trials(3, masks, False)
    ]
