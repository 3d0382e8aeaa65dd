"""Hankel singular values to high precision, and truncations inside their bound."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import scipy.linalg
import torch
from systems import DIAGONAL, dense, diagonal, gain, normal, repeated, response, sweep

from controlprune.ssm import balanced_truncation, error_bound, gramians, hankel_singular_values
from controlprune.ssm.balanced import balancing


def by_mpmath(poles: np.ndarray, B: np.ndarray, C: np.ndarray) -> np.ndarray:
    """√eig(P Q) in 80 digits, where it is harmless."""
    with mpmath.workdps(80):
        z = [mpmath.mpc(pole) for pole in poles]
        inputs, outputs = mpmath.matrix(B.tolist()), mpmath.matrix(C.tolist())
        P, Q = inputs * inputs.H, outputs.H * outputs
        n = len(z)
        for i in range(n):
            for j in range(n):
                P[i, j] /= 1 - z[i] * mpmath.conj(z[j])
                Q[i, j] /= 1 - mpmath.conj(z[i]) * z[j]
        found = mpmath.eig(P * Q, left=False, right=False)
        return np.array(sorted((float(mpmath.sqrt(abs(v))) for v in found), reverse=True))


def root(P: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(P)
    return vectors * np.sqrt(values.clip(0))


@pytest.mark.parametrize("name", DIAGONAL)
def test_values_agree_with_lyapunov_and_svd(name: str) -> None:
    poles, B, C = DIAGONAL[name]
    A = np.diag(poles)
    P = scipy.linalg.solve_discrete_lyapunov(A, B @ B.conj().T)
    Q = scipy.linalg.solve_discrete_lyapunov(A.conj().T, C.conj().T @ C)
    expected = np.linalg.svd(root(Q).conj().T @ root(P), compute_uv=False)
    found = hankel_singular_values(poles, B, C)
    assert np.abs(found - expected).max() <= 1e-6 * expected[0]


@pytest.mark.parametrize(
    "system",
    [
        diagonal(6, 1, 1, 0.3, 0.9),
        diagonal(6, 2, 3, 0.9, 0.9999),
        diagonal(7, 1, 2, 0.2, 0.999, phase=0.0),
        repeated(6, 1, 1, kinds=3, spread=1e-3),
    ],
    ids=["easy", "near-unstable", "positive real", "clustered"],
)
def test_every_value_agrees_with_mpmath_also_the_smallest(system: tuple) -> None:
    expected = by_mpmath(*system)
    found = hankel_singular_values(*system)
    assert np.abs(found - expected).max() <= 1e-11 * expected[0]
    if system[1].shape[1] == 1:  # products only: relative digits too, down to 1e-15 of the largest
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-15 * expected[0])


def test_small_values_are_lost_by_the_root_of_eigenvalues_and_not_here() -> None:
    system = repeated(12, 1, 1, kinds=4, spread=1e-3)
    found, expected = hankel_singular_values(*system), by_mpmath(*system)
    poles, B, C = system
    P = B @ B.conj().T / (1 - poles[:, None] * poles.conj())
    Q = C.conj().T @ C / (1 - poles.conj()[:, None] * poles)
    naive = np.sort(np.sqrt(np.linalg.eigvals(P @ Q).real.clip(0)))[::-1]
    assert np.abs(naive - expected).max() > 100 * np.abs(found - expected).max()


@pytest.mark.parametrize("n", [4, 24, 96])
def test_truncations_agree_with_slycot(n: int) -> None:
    slycot = pytest.importorskip("slycot")
    A, B, C = dense(n, 2, 3, 0.98, seed=n)
    r = n // 2
    found = balanced_truncation(A, B, C, np.zeros((3, 2)), r)
    order, a, b, c, values = slycot.ab09ad("D", "B", "N", n, 2, 3, A, B, C, r, -2.0)[:5]
    assert order == r
    assert np.abs(hankel_singular_values(A, B, C) - values).max() <= 1e-6 * values[0]
    points = sweep((np.linalg.eigvals(A), B, C))
    ours, theirs = (_dense_response(*s, points) for s in (found[:3], (a, b, c)))
    assert gain(ours - theirs) <= 1e-6 * values[0]


def _dense_response(A: np.ndarray, B: np.ndarray, C: np.ndarray, z: np.ndarray) -> np.ndarray:
    return C @ np.linalg.solve(z[:, None, None] * np.eye(len(A)) - A, B.astype(complex)[None])


@pytest.mark.parametrize("name", DIAGONAL)
@pytest.mark.parametrize("share", [0.1, 0.4, 0.9])
def test_the_error_of_a_truncation_is_below_its_bound(name: str, share: float) -> None:
    system = DIAGONAL[name]
    n = len(system[0])
    values = hankel_singular_values(*system)
    r = max(1, int(share * n))
    poles, B, C, _ = balanced_truncation(*system, np.zeros(1), r)
    assert len(poles) == min(r, balancing(*system).rank)
    assert np.abs(poles).max() < 1
    z = sweep(system, (poles, B, C))
    error = gain(response(*system, z, real=False) - response(poles, B, C, z, real=False))
    assert error <= error_bound(values, r) + 1e-6 * values[0]


def test_random_inputs_are_answered_within_the_bound() -> None:
    """‖y − ŷ‖₂ ≤ 2 Σ σ ‖u‖₂ over whole sequences, run through both recurrences."""
    draw = np.random.default_rng(3)
    system = diagonal(40, 2, 3, 0.7, 0.99)
    values = hankel_singular_values(*system)
    for r in (4, 12, 30):
        small = balanced_truncation(*system, np.zeros(1), r)[:3]
        u = normal(draw, 400, 2)
        difference = _run(*system, u) - _run(*small, u)
        assert np.linalg.norm(difference) <= error_bound(values, r) * np.linalg.norm(u)
        assert np.linalg.norm(difference) > 0


def _run(poles: np.ndarray, B: np.ndarray, C: np.ndarray, u: np.ndarray) -> np.ndarray:
    x, out = np.zeros(len(poles), complex), []
    for now in u:
        x = poles * x + B @ now
        out.append(C @ x)
    return np.array(out)


def test_a_dense_truncation_is_balanced() -> None:
    A, B, C = dense(20, 2, 2, 0.95)
    small = balanced_truncation(A, B, C, np.zeros((2, 2)), 20)
    values = hankel_singular_values(A, B, C)
    for gramian in gramians(*small[:3]):
        assert np.allclose(gramian, np.diag(values), atol=1e-9 * values[0])


def test_near_a_jordan_block_a_diagonal_system_is_found_all_the_same() -> None:
    """C (zI − A)⁻¹ B with poles that nearly meet and residues of 1e8 that nearly cancel."""
    poles = np.array([0.9, 0.9 - 1e-4, 0.9 + 1e-4, -0.3], complex)
    B, C = np.ones((4, 1), complex), np.array([[-2e8, 1e8, 1e8, 1.0]], complex)
    values = hankel_singular_values(poles, B, C)
    small = balanced_truncation(poles, B, C, np.zeros(1), 4)[:3]
    z = sweep((poles, B, C))
    error = gain(response(poles, B, C, z, real=False) - response(*small, z, real=False))
    assert error <= 1e-6 * values[0]
    # of a triple pole rounding moves each by ε^(1/3) = 6e-6, here 6 % of what lies between them, one way or
    # another by the machine's LAPACK: residues of 2e8 come out up to a few times 6 % larger
    assert np.abs(small[1] * small[2].T).max() < 3e8, "cancels hardly worse than before"


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_torch_in_torch_out(dtype: torch.dtype) -> None:
    system = [torch.as_tensor(x).to(dtype) for x in diagonal(12, 2, 3, 0.5, 0.9)]
    D = torch.zeros(3, 2)
    values = hankel_singular_values(*system)
    small = balanced_truncation(*system, D, 5)
    assert values.dtype == torch.empty((), dtype=dtype).real.dtype
    assert [x.dtype for x in small] == [dtype, dtype, dtype, torch.float32]
    assert [tuple(x.shape) for x in small] == [(5,), (5, 2), (3, 5), (3, 2)]
    expected = hankel_singular_values(*(x.numpy() for x in system))
    assert np.allclose(values.numpy(), expected, rtol=1e-5)


def test_what_cannot_be_truncated_is_said() -> None:
    A, B, C = diagonal(4, 2, 3, 0.5, 0.9)
    with pytest.raises(ValueError, match=r"largest eigenvalue has \|λ\| = 1"):
        hankel_singular_values(A / np.abs(A).max(), B, C)
    with pytest.raises(ValueError, match=r"r=5: give a number of states between 1 and 4"):
        balanced_truncation(A, B, C, np.zeros(1), 5)
    with pytest.raises(ValueError, match="have shapes"):
        hankel_singular_values(A, C, B)
    with pytest.raises(ValueError, match="not finite"):
        hankel_singular_values(A, B * np.nan, C)
