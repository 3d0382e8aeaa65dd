"""The LQR against the Riccati recursion by hand, against every other gain, and on the linear plant."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from controlprune.price.design import design
from controlprune.price.identify import Response
from controlprune.price.lqr import LQR, LQRState, lqr, matrices
from controlprune.price.pi import PI

RESPONSES = [Response(0.3), Response(0.3, 0.6), Response(1.0, 0.9, 2), Response(2.0, 0.2, 1)]


@pytest.mark.parametrize("response", RESPONSES)
@pytest.mark.parametrize("effort", [1e-3, 0.1])
def test_gains_are_the_limit_of_dynamic_programming(response, effort) -> None:
    a, b = matrices(response)
    q = np.zeros_like(a)
    q[0, 0] = 1.0
    p = q
    for _ in range(3000):
        k = np.linalg.solve(effort + b.T @ p @ b, b.T @ p @ a)
        p = q + a.T @ p @ (a - b @ k)
    assert lqr(response, effort).gains == pytest.approx(k[0].tolist(), rel=1e-6, abs=1e-9)


def simulate(
    response: Response, regulator: LQR | PI, reference: list[float]
) -> tuple[np.ndarray, np.ndarray]:
    """(use, log price) of the linear plant, use 1 at rest."""
    regulator = replace(regulator, initial=1.0, low=1e-300, high=1e300)
    state, y, uses, logs = regulator.init(), 1.0, [], [0.0]
    queue = [0.0] * response.delay
    for t, r in enumerate(reference):
        uses.append(y)
        ahead = reference[min(t + 1, len(reference) - 1)]
        if isinstance(regulator, LQR):
            assert isinstance(state, LQRState)
            state = regulator.update(state, y, r, ahead)
        else:
            state = regulator.update(state, y - r)  # type: ignore[arg-type]
        logs.append(math.log(state.price))
        queue.append(logs[-1])
        a = response.pole
        y = 1 + a * (y - 1) - (1 - a) * response.gain * queue.pop(0)
    return np.array(uses), np.array(logs)


@pytest.mark.parametrize("response", RESPONSES)
def test_no_cost_is_lower_after_a_step(response) -> None:
    """Σ e² + R Δu² of the LQR is below that of a well designed PI and of its own gains scaled."""
    reference, effort = [1.0] + [0.6] * 300, 0.05
    best = replace(lqr(response, effort), feedforward=0.0)

    def cost(regulator: LQR | PI) -> float:
        uses, logs = simulate(response, regulator, reference[1:])
        return float(((uses - 0.6) ** 2).sum() + effort * (np.diff(logs) ** 2).sum())

    for other in [design(response).regulator, *(_scaled(best, s) for s in (0.8, 1.2))]:
        assert cost(best) < cost(other)


def _scaled(regulator: LQR, factor: float) -> LQR:
    return replace(regulator, gains=tuple(k * factor for k in regulator.gains))


@pytest.mark.parametrize("response", RESPONSES)
def test_follows_a_planned_ramp_closer_than_pi(response) -> None:
    reference = [max(0.4, 1 - 0.01 * t) for t in range(400)]
    tracked, _ = simulate(response, lqr(response), reference)
    plain, _ = simulate(response, design(response).regulator, reference)
    assert abs(tracked[-1] - 0.4) < 1e-6
    assert np.abs(tracked - reference).max() < np.abs(plain - reference).max()


def test_small_effort_is_deadbeat() -> None:
    uses, _ = simulate(
        Response(0.3, 0.4), replace(lqr(Response(0.3, 0.4), 1e-12), feedforward=0.0), [0.7] * 5
    )
    assert uses[:2] == pytest.approx([1.0, 0.7], abs=1e-4)


def test_no_windup_and_bumpless() -> None:
    regulator = replace(lqr(Response(0.3)), initial=1.0, high=10.0)
    state = regulator.init()
    for _ in range(200):
        state = regulator.update(state, 1.0, 0.0, 0.0)
    assert state.price == 10.0
    assert regulator.update(state, 0.0, 0.2, 0.2).price < 10.0
    state = regulator.update(state, 0.5, 0.5, 0.5, applied=2.0)
    assert state.price == pytest.approx(2.0)
    assert regulator.update(state, 0.5, 0.5, 0.5).price == pytest.approx(2.0)
    assert regulator.update(state, math.nan, 0.5, 0.5) is state


@pytest.mark.parametrize("effort", [0.0, -1.0, math.inf])
def test_bad_effort(effort) -> None:
    with pytest.raises(ValueError, match="effort"):
        lqr(Response(0.3), effort)
