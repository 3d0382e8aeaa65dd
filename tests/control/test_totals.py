"""Run totals: the arithmetic of the rest, and that it ends on the limit whatever goes wrong on the way."""

from __future__ import annotations

import math

import numpy as np
import pytest

from controlprune.control.ramp import Plan
from controlprune.control.scale import Observer
from controlprune.control.totals import DEAD, hastened, mean_left, rest, steady


def test_the_rest_by_hand() -> None:
    assert mean_left(0.6, 0.2, 0.2) == pytest.approx(0.5)
    assert rest(0.5, 0.0) == 0.5
    assert rest(0.5, 0.2) == pytest.approx(0.375)  # 0.2 at dense and 0.8 at 0.375
    assert 0.2 + 0.8 * rest(0.5, 0.2) == pytest.approx(0.5)
    assert rest(2.0, 0.3) == 1.0
    assert rest(0.1, 0.2) < 0.0
    assert rest(0.9, 1.0) == -math.inf
    assert rest(1.0, 1.0) == 1.0


def test_steady_goes_half_way_to_the_mean_or_asks_for_nothing_new() -> None:
    assert steady(0.6, 0.2, 0.2, 0.9) == pytest.approx((0.9 + mean_left(0.6, 0.2, 0.2)) / 2)
    assert steady(0.6, 0.2, 0.2, 0.5) == 0.5
    assert steady(0.6, 0.2, 0.2, 0.5 + 0.5 * DEAD * 0.6 / 0.8) == 0.5 + 0.5 * DEAD * 0.6 / 0.8
    assert steady(0.6, 0.59, 0.999, 0.5) < 0.6  # a rest of a hundredth is not thrown at the last thousandth
    assert steady(0.5, 0.6, 0.9, 0.4) == 0.0


def test_hastened_keeps_a_patient_plan_and_speeds_up_a_tight_one() -> None:
    plan = Plan(earliest=0.1, latest=0.15, duration=0.3, deadline=0.5)

    def ahead(factor: float) -> float:
        return plan.scaled(factor).ahead(0.0, 1.0, None)

    assert hastened(0.9, ahead, 0.0) == 1.0
    factor = hastened(0.2, ahead, 0.0)
    assert 0.0 < factor < 1.0
    assert rest(0.2, ahead(factor)) == pytest.approx(0.6 * 0.2, rel=1e-6)
    sooner = hastened(0.2, ahead, 0.1)  # half of what may be used does not shrink
    assert 0.0 < sooner < factor
    assert rest(0.2, ahead(sooner)) == pytest.approx(0.1 + 0.6 * 0.1, rel=1e-6)


@pytest.mark.parametrize("real", [0.5, 1.0, 2.0, 3.0])
def test_it_settles_where_the_real_gain_is_another(real: float) -> None:
    """A change of the use does `real` times what it should, up to three times."""
    use, spent, found = 0.4, 0.2, []
    for k in range(80):
        asked = steady(0.5, spent, 0.3 + 0.005 * k, use)
        use += real * (asked - use)
        spent += 0.005 * use
        found.append(use)
    assert max(found[20:]) - min(found[20:]) < 0.02


@pytest.mark.parametrize("limit", [0.2, 0.4, 0.7, 0.95])
@pytest.mark.parametrize("factor", [0.7, 1.0, 1.3])
def test_a_run_ends_on_its_limit(limit: float, factor: float) -> None:
    """The model of a step is wrong (by `factor` when tiny), its use noisy; an observer is at work."""
    plan = Plan(earliest=0.1, latest=0.15, duration=0.3, deadline=0.5)
    quick = plan.scaled(hastened(limit, lambda f: plan.scaled(f).ahead(0.0, 1.0, None), 0.0))
    random = np.random.default_rng(0)
    observer = Observer()
    state = observer.init()
    updates, spent, use = 200, 0.0, 1.0
    for k in range(updates):
        progress = k / updates
        level = max(0.0, min(1.0, 1 - (progress - quick.latest) / quick.duration))
        if level > 0:
            started = None if level == 1 else 0.0
            end = rest(mean_left(limit, spent, progress), quick.ahead(progress, level, started))
        else:
            end = steady(limit, spent, progress, use)
        asked = max(end, 0.02) + (1 - max(end, 0.02)) * level
        modelled = 1.0 if level == 1 else min(max(round(asked / state.scale / 0.01) * 0.01, 0.01), 1.0)
        use = modelled * (1.0 + (factor - 1.0) * (1.0 - modelled))
        measured = use * (1 + 0.02 * random.standard_normal())
        spent += measured / updates
        state = observer.update(state, modelled, measured, 0.02)
    assert spent == pytest.approx(limit, rel=0.01)
