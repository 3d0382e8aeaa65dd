"""Recursive least squares against the batch solution, and the response of a known plant."""

from __future__ import annotations

import math

import numpy as np
import pytest

from controlprune.control.least_squares import LeastSquares
from controlprune.price.identify import Identifier


@pytest.mark.parametrize("forgetting", [1.0, 0.95])
def test_recursion_is_weighted_ridge(forgetting: float) -> None:
    rng = np.random.default_rng(0)
    phi, y = rng.normal(size=(40, 3)), rng.normal(size=40)
    squares = LeastSquares((0.1, -0.2, 0.3), spread=5.0, forgetting=forgetting)
    state = squares.init()
    for row, target in zip(phi, y, strict=True):
        state = squares.update(state, row, target)
    weight = forgetting ** np.arange(39, -1, -1)
    prior = forgetting**40 / 25 * np.eye(3)
    normal = phi.T @ (weight[:, None] * phi) + prior
    expected = np.linalg.solve(normal, phi.T @ (weight * y) + prior @ [0.1, -0.2, 0.3])
    assert state.theta == pytest.approx(expected, rel=1e-8 if forgetting == 1 else 1e-4)  # capped at first


def test_known_plant_is_found() -> None:
    rng = np.random.default_rng(1)
    identifier = Identifier(forgetting=1.0)
    state, y = identifier.init(), 0.5
    for _ in range(200):
        u = rng.normal()
        state = identifier.update(state, y, math.exp(u))
        y = 0.7 * y - 0.3 * 0.4 * u + 0.05 + 1e-4 * rng.normal()
    response = identifier.response(state)
    assert response.gain == pytest.approx(0.4, rel=0.02)
    assert response.pole == pytest.approx(0.7, abs=0.02)


def test_a_plant_that_changes_is_followed() -> None:
    rng = np.random.default_rng(2)
    identifier = Identifier(forgetting=0.95)
    state = identifier.init()
    y = 0.5
    for gain in (0.2, 0.6):
        for _ in range(150):
            u = rng.normal()
            state = identifier.update(state, y, math.exp(u))
            y = 0.5 - gain * u + 1e-3 * rng.normal()
        assert identifier.response(state).gain == pytest.approx(gain, rel=0.02)


def test_without_excitation_the_covariance_stays_bounded() -> None:
    squares = LeastSquares((0.0, 0.0), spread=3.0, forgetting=0.9)
    state = squares.init()
    for _ in range(2000):
        state = squares.update(state, (1.0, 0.0), 2.0)
    assert np.linalg.eigvalsh(state.covariance).max() <= 9 * (1 + 1e-9)
    assert state.theta[0] == pytest.approx(2.0)
    for _ in range(50):
        state = squares.update(state, (1.0, 0.0), 5.0)
    assert state.theta[0] == pytest.approx(5.0, rel=0.02)  # still awake


def test_nonsense_falls_back_on_the_belief() -> None:
    identifier = Identifier(gain=0.25)
    state, rng, y = identifier.init(), np.random.default_rng(0), 0.5
    for _ in range(50):
        u = rng.normal()
        state = identifier.update(state, y, math.exp(u))
        y = 0.5 + 0.3 * u  # use rises with the price: impossible
    assert identifier.response(state).gain == 0.25


def test_non_finite_samples_and_zero_prices_are_skipped() -> None:
    identifier = Identifier()
    state = identifier.update(identifier.init(), 0.5, 1.0)
    after = identifier.update(state, math.nan, 0.0)
    assert np.array_equal(after.fit.theta, state.fit.theta)
    assert identifier.update(after, 0.4, 1.0).fit is after.fit


@pytest.mark.parametrize("arguments", [{"forgetting": 0.0}, {"forgetting": 1.1}, {"spread": 0.0}])
def test_bad_settings(arguments) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}="):
        LeastSquares((0.0,), **arguments)
