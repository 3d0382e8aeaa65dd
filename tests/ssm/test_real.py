"""What is reduced where the output is Re(C x): the real system, in the layer's own complex states."""

from __future__ import annotations

import numpy as np
import pytest
from systems import DIAGONAL, diagonal, gain, response, sweep

from controlprune.ssm import hankel_singular_values
from controlprune.ssm.balanced import balancing
from controlprune.ssm.diagonal import diagonalised
from controlprune.ssm.real import real_balancing, real_order, real_reduction, real_system

EPS = float(np.finfo(float).eps)


@pytest.mark.parametrize("name", DIAGONAL)
def test_its_values_are_those_of_the_real_system_of_twice_the_order(name: str) -> None:
    system = DIAGONAL[name]
    found = real_balancing(*system).values
    expected = hankel_singular_values(*real_system(*system))
    assert np.abs(found - expected).max() <= 1e-8 * expected[0]


@pytest.mark.parametrize("name", DIAGONAL)
@pytest.mark.parametrize("share", [0.1, 0.3, 0.8])
def test_the_error_of_the_real_output_is_below_the_bound(name: str, share: float) -> None:
    system = DIAGONAL[name]
    states = max(1, int(share * len(system[0])))
    found = real_balancing(*system)
    small = real_reduction(found, states, EPS)
    assert small.states <= states
    assert np.abs(small.poles).max() < 1
    reduced = (small.poles, small.B, small.C)
    z = sweep(system, reduced)
    error = gain(response(*system, z, real=True) - response(*reduced, z, real=True))
    assert error <= small.bound + 1e-6 * found.values[0]
    assert found.bound(small.order) <= small.bound


def test_a_pole_and_its_conjugate_are_one_mode() -> None:
    """Λ = (λ, λ̄): two states for the complex system, one for the output that is real."""
    poles, B, C = diagonal(5, 2, 2, 0.5, 0.95)
    twice = (np.concatenate([poles, poles.conj()]), np.vstack([B, B.conj()]), np.hstack([C, C.conj()]))
    small = real_reduction(real_balancing(*twice), 5, EPS)
    z = sweep(twice)
    error = gain(response(*twice, z, real=True) - response(small.poles, small.B, small.C, z, real=True))
    assert error <= 1e-12
    assert balancing(*twice).bound(5) > 0.1, "the complex system would have lost something"


def test_a_positive_real_pole_is_one_state_whose_other_half_can_learn() -> None:
    system = diagonal(6, 1, 1, 0.3, 0.999, phase=0.0)
    poles, B, C = (x.real.astype(complex) for x in system)
    small = real_reduction(real_balancing(poles, B, C), 4, EPS)
    assert small.states == 4 == small.order
    assert np.abs(small.poles.imag).max() == 0
    assert np.abs(small.B.imag).min() > 0


def test_tolerance_keeps_its_share_of_the_values() -> None:
    system = diagonal(64, 4, 4, 0.8, 0.99)
    found = real_balancing(*system)
    for tolerance in (0.2, 0.05, 0.01):
        order = found.order(tolerance)
        assert found.values[:order].sum() >= (1 - tolerance) * found.values.sum()
        assert found.values[: order - 1].sum() < (1 - tolerance) * found.values.sum()
        states = real_order(found, tolerance, EPS)
        assert order / 2 <= states <= order
        assert real_reduction(found, states, EPS).order >= order


def test_both_halves_of_a_state_are_of_one_size() -> None:
    small = real_reduction(real_balancing(*diagonal(32, 3, 5, 0.8, 0.999)), 10, EPS)
    enters = np.linalg.norm(small.B, axis=1) / np.sqrt(1 - np.abs(small.poles) ** 2)
    assert enters == pytest.approx(np.linalg.norm(small.C, axis=0))


def test_the_projection_is_the_reduction() -> None:
    system = diagonal(16, 2, 2, 0.9, 0.99, seed=1)
    small = real_reduction(real_balancing(*system), 6, EPS)
    assert small.order == 12, "conjugate pairs only"
    A, B, C = real_system(*system)
    a, b, c = real_system(small.poles, small.B, small.C)
    assert np.allclose(small.R @ B, b)
    assert np.allclose(C @ small.S, c)
    assert np.allclose(small.R @ A @ small.S, a)


def test_a_defective_matrix_gets_a_diagonal_form_that_single_precision_bears() -> None:
    A = np.array([[0.9, 1.0, 0.0], [0.0, 0.9, 1.0], [0.0, 0.0, 0.9]])
    B, C = np.array([[0.0], [0.0], [1.0]]), np.array([[1.0, 0.0, 0.0]])
    modal = diagonalised(A, B, C, precision=1e-7)
    z = sweep((modal.poles, modal.B, modal.C))
    dense = C @ np.linalg.solve(z[:, None, None] * np.eye(3) - A, B.astype(complex)[None])
    exact = response(modal.poles, modal.B, modal.C, z, real=False)
    single = (modal.poles, modal.B.astype(np.complex64), modal.C.astype(np.complex64))
    assert gain(exact - dense) <= 0.02 * gain(dense)
    assert gain(response(*single, z, real=False) - dense) <= 0.02 * gain(dense)
    assert gain(exact - dense) <= modal.error * 1.5
