"""The scalar Kalman filter of measured over modelled: its limit cases and its recurrence by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlprune.control.scale import Observer


def test_believes_the_model_at_first() -> None:
    assert Observer().init().scale == 1.0


def test_one_step_by_hand() -> None:
    observer = Observer(doubt=0.3, drift=0.1, spread=0.02)
    state = observer.update(observer.init(), 2.0, 3.0, spread=0.05)
    p = 0.3**2 + 0.1**2
    k = p / (p + 0.05**2)
    assert state.log_scale == pytest.approx(k * math.log(1.5))
    assert state.variance == pytest.approx((1 - k) * p)


def test_an_exact_measurement_is_deadbeat() -> None:
    observer = Observer(spread=1e-9)
    assert observer.update(observer.init(), 0.5, 0.8).scale == pytest.approx(1.6)


def test_without_drift_it_averages() -> None:
    observer = Observer(doubt=1e3, drift=0.0, spread=0.1)
    state = observer.init()
    for measured in (1.0, 2.0, 4.0):
        state = observer.update(state, 1.0, measured, 0.1)
    assert state.scale == pytest.approx(2.0, rel=1e-6)  # the geometric mean


def test_integral_action_removes_a_constant_error() -> None:
    """Widths are chosen so that model × s meets the limit; the plant is 1.4 × model, bent a little."""
    observer, limit = Observer(), 0.5
    state = observer.init()
    use = 1.0
    for _ in range(20):
        modelled = limit / state.scale
        use = 1.4 * modelled**0.8
        state = observer.update(state, modelled, use, 0.02)
    assert use == pytest.approx(limit, rel=1e-3)


@pytest.mark.parametrize("measured", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_measurement_changes_nothing(measured: float) -> None:
    observer = Observer()
    assert observer.update(observer.init(), 1.0, measured) == observer.init()


@given(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0, 1))
def test_stays_between_belief_and_measurement(modelled: float, measured: float, spread: float) -> None:
    observer = Observer()
    scale = observer.update(observer.init(), modelled, measured, spread).scale
    low, high = sorted((1.0, measured / modelled))
    assert low * (1 - 1e-9) <= scale <= high * (1 + 1e-9)


@pytest.mark.parametrize("name", ["doubt", "drift", "spread"])
def test_settings_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=rf"Observer\({name}=-1"):
        Observer(**{name: -1.0})
