"""Computed margins against a simulated loop: at the margin it breaks, inside it does not."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from controlprune.price.design import design, margins
from controlprune.price.identify import Response
from controlprune.price.pi import PI

RESPONSES = [
    Response(0.3, 0.0, 1),
    Response(0.3, 0.6),
    Response(0.3, 0.6, 1),
    Response(1.0, 0.9, 2),
    Response(2.0, 0.2, 1),
]


def simulate(response: Response, regulator: PI, steps: int = 600, more_delay: int = 0) -> np.ndarray:
    """y after a reference step of −0.01, the regulator itself in the loop (wide stops: linear in u)."""
    regulator = replace(regulator, initial=1.0, low=1e-300, high=1e300)
    state, y, outputs = regulator.init(), 0.0, []
    queue = [0.0] * (response.delay + more_delay)
    for _ in range(steps):
        outputs.append(y)
        state = regulator.update(state, y + 0.01)
        queue.append(math.log(state.price))
        y = response.pole * y - (1 - response.pole) * response.gain * queue.pop(0)
    return np.array(outputs)


def grows(y: np.ndarray) -> bool:
    error = np.abs(y + 0.01)
    return bool(error[-60:].max() > min(error[60:120].max() + 1e-12, 1.0))  # 1: at the stops


@pytest.mark.parametrize("response", RESPONSES)
@pytest.mark.parametrize("smoothing", [0.0, 0.5])
@pytest.mark.parametrize("phase", [45.0, 60.0])
def test_designed_loop_has_its_margins(response, smoothing, phase) -> None:
    found = design(response, phase, smoothing)
    assert found.margins.phase == pytest.approx(phase, abs=0.01)
    y = simulate(response, found.regulator)
    assert abs(y[-1] + 0.01) < 1e-5  # no steady-state error
    assert y.min() > -0.01 * 1.6  # overshoot


@pytest.mark.parametrize("response", RESPONSES)
def test_gain_margin_is_where_the_simulated_loop_breaks(response) -> None:
    found = design(response, 60.0)

    def scaled(factor: float) -> PI:
        pi = found.regulator
        return replace(pi, integral=pi.integral * factor, proportional=pi.proportional * factor)

    assert not grows(simulate(response, scaled(0.97 * found.margins.gain)))
    assert grows(simulate(response, scaled(1.03 * found.margins.gain)))
    assert not grows(simulate(response, scaled(2.0)))  # doubling the gain is inside every margin here


@pytest.mark.parametrize("response", RESPONSES)
def test_delay_margin_is_where_the_simulated_loop_breaks(response) -> None:
    found = design(response, 50.0)
    assert not grows(simulate(response, found.regulator, more_delay=math.ceil(found.margins.delay) - 1))
    assert grows(simulate(response, found.regulator, more_delay=math.floor(found.margins.delay) + 1))


@pytest.mark.parametrize("response", RESPONSES)
def test_closed_form(response) -> None:
    omega = (math.pi / 2 - math.radians(60)) / (response.delay + 0.5)
    assert design(response).regulator.integral * response.gain == pytest.approx(2 * math.sin(omega / 2))


def test_default_gains_are_the_designed_ones() -> None:
    regulator = design(Response(0.3, 0, 1), delay_margin=8.0).regulator
    assert PI().integral == pytest.approx(regulator.integral, rel=0.01)
    assert PI().proportional == regulator.proportional == 0


@pytest.mark.parametrize("response", RESPONSES)
@pytest.mark.parametrize("delay", [3.0, 6.0])
def test_a_delay_margin_is_had_too(response, delay) -> None:
    """The slower of the two asked for, and not slower than it must be."""
    found, by_phase = design(response, delay_margin=delay), design(response)
    assert found.margins.delay >= delay * 0.999
    assert found.margins.phase >= 60 - 0.01
    slower = by_phase.margins.delay < delay
    tight = found.margins.delay if slower else found.margins.phase
    assert tight == pytest.approx(delay if slower else 60.0, rel=1e-3)
    assert not grows(simulate(response, found.regulator, more_delay=math.ceil(delay) - 1))


def test_a_loop_beyond_its_margins_says_so() -> None:
    calm, fast = margins(Response(0.3, 0, 1), PI(1.0)), margins(Response(0.3, 0, 1), PI(3.0))
    assert calm.gain / fast.gain == pytest.approx(3.0)
    assert fast.damping < calm.damping
    assert margins(Response(0.3, 0, 1), PI(3.5)).gain < 1


@pytest.mark.parametrize("pole", [0.0, 1e-4, 1e-2, 0.5, 0.99])
def test_margins_are_found_wherever_the_pole_is(pole) -> None:
    found = design(Response(0.58, pole), delay_margin=6.0).margins
    assert found.delay == pytest.approx(6.0, rel=1e-3)
    assert math.isfinite(found.gain)


@pytest.mark.parametrize("phase", [0, 90, -10])
def test_impossible_phase_margin(phase) -> None:
    with pytest.raises(ValueError, match="phase_margin"):
        design(Response(0.3), phase)


@pytest.mark.parametrize("arguments", [{"gain": 0.0}, {"gain": math.nan}, {"pole": 1.0}, {"delay": -1}])
def test_impossible_response(arguments) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}="):
        Response(**({"gain": 0.3} | arguments))
