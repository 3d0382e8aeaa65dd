"""Gramians agree with scipy's and python-control's, and keep the digits that a formed Gramian loses."""

from __future__ import annotations

import control
import numpy as np
import pytest
import scipy.linalg
from systems import DIAGONAL, System, dense, diagonal, repeated

from controlprune.ssm.gramians import controllability_factor, gramians, observability_factor


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-9) -> bool:
    return bool(np.abs(found - expected).max() <= tolerance * np.abs(expected).max())


@pytest.mark.parametrize("name", DIAGONAL)
def test_a_diagonal_system_has_the_gramians_of_scipy_and_of_the_closed_form(name: str) -> None:
    poles, B, C = DIAGONAL[name]
    P, Q = gramians(poles, B, C)
    closed = B @ B.conj().T / (1 - poles[:, None] * poles.conj())
    assert close(P, closed)
    A = np.diag(poles)
    assert close(P, scipy.linalg.solve_discrete_lyapunov(A, B @ B.conj().T), 1e-7)
    assert close(Q, scipy.linalg.solve_discrete_lyapunov(A.conj().T, C.conj().T @ C), 1e-7)


@pytest.mark.parametrize(("n", "radius"), [(3, 0.5), (12, 0.99), (48, 0.9999), (256, 0.999)])
def test_a_dense_system_has_the_gramians_of_python_control(n: int, radius: float) -> None:
    A, B, C = dense(n, 2, 3, radius)
    P, Q = gramians(A, B, C)
    assert close(P, scipy.linalg.solve_discrete_lyapunov(A, B @ B.T), 1e-7)
    if n <= 48:
        pytest.importorskip("slycot")
        system = control.ss(A, B, C, np.zeros((3, 2)), True)
        assert close(P, control.gram(system, "c"), 1e-7)
        assert close(Q, control.gram(system, "o"), 1e-7)


def test_diagonal_and_dense_algorithms_agree() -> None:
    poles, B, C = diagonal(32, 4, 4, 0.6, 0.9999)
    for fast, slow in zip(gramians(poles, B, C), gramians(np.diag(poles), B, C), strict=True):
        assert close(fast, slow, 1e-9)


def test_a_factor_has_as_many_columns_as_there_are_reachable_directions() -> None:
    poles, B, C = repeated(24, 2, 3, kinds=3)
    assert controllability_factor(poles, B).shape == (24, 3 * 2)
    assert observability_factor(poles, C).shape == (24, 3 * 3)
    B[5:] = 0
    assert controllability_factor(poles, B).shape == (24, 5)
    assert controllability_factor(poles, 0 * B).shape == (24, 0)


@pytest.mark.parametrize("high", [0.9, 0.9999])
def test_the_smallest_pivot_has_its_digits_where_cholesky_fails(high: float) -> None:
    """det P of a single input is known: Π b_i² Π |λ_i − λ_j|² / Π (1 − λ_i λ̄_j) (Cauchy)."""
    poles, B, _ = diagonal(18, 1, 1, 0.3, high, phase=0.0)
    factor = controllability_factor(poles, B)
    i, j = np.triu_indices(18, 1)
    all_pairs = np.log(np.abs(1 - poles[:, None] * poles.conj())).sum()
    parted = 2 * np.log(np.abs(poles[i] - poles[j])).sum()
    expected = 2 * np.log(np.abs(B)).sum() + parted - all_pairs
    assert 2 * np.linalg.slogdet(factor)[1] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(np.linalg.LinAlgError):
        np.linalg.cholesky(factor @ factor.conj().T)


def test_scale_of_a_state_does_not_matter() -> None:
    """x_i → s_i x_i moves digits between B and C; the factor's rows follow exactly."""
    system: System = diagonal(12, 2, 2, 0.5, 0.999)
    poles, B, _ = system
    scale = 2.0 ** np.arange(-30, 30, 5)
    plain = controllability_factor(poles, B)
    scaled = controllability_factor(poles, B * scale[:, None])
    assert np.allclose(scaled, plain * scale[:, None], rtol=1e-12, atol=0)
