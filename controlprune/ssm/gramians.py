"""Gramians of a stable discrete-time system, always as factors, never formed and never subtracted from.

    x⁺ = A x + B u,   y = C x + D u            A: [n] (diagonal) or [n, n],  B: [n, m],  C: [p, n]
    P = A P Aᴴ + B Bᴴ,   Q = Aᴴ Q A + Cᴴ C     P = L_P L_Pᴴ,  Q = L_Q L_Qᴴ

For a diagonal A the Gramian is known entry by entry, P_ij = b_i b_jᴴ / (1 − λ_i λ̄_j), but a Cholesky
factorisation of it loses all singular values below √ε. The tangential Schur algorithm gives the
pivoted Cholesky factor straight from (λ, B): with the pivot k, v = b_kᴴ / ‖b_k‖ and the all-pass
φ(z) = (z − λ_k) / (1 − λ̄_k z),

    column of L:   l_i = b_i v √(1 − |λ_k|²) / (1 − λ_i λ̄_k)
    what is left:  P − l lᴴ is the Gramian of (λ, B′),   b′_i = b_i (I − v vᴴ) + φ(λ_i) b_i v vᴴ

because 1 − φ(λ_i) φ̄(λ_j) = (1 − |λ_k|²)(1 − λ_i λ̄_j) / ((1 − λ_i λ̄_k)(1 − λ_k λ̄_j)). In a basis of the
inputs that begins with v there are products only: small singular values keep their digits.

For a dense A the factor is doubled (squared Smith): L ← compress [L, A^(2^j) L].

Sources: Penzl, "A cyclic low-rank Smith method" (1999); Sayed and Kailath, "Displacement structure" (1995);
Ball, Gohberg and Rodman, "Interpolation of rational matrix functions" (1990).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Array",
    "compressed",
    "controllability_factor",
    "gramians",
    "observability_factor",
    "spectral_radius",
]

Array = NDArray[np.inexact[Any]]

DOUBLINGS = 60  # 2^60 steps: more than any pole that a double tells from 1 needs
ROUNDING = 8 * float(np.finfo(float).eps)  # of a row's length: what is left then is the noise of its turning


def gramians(A: Array, B: Array, C: Array) -> tuple[Array, Array]:
    """P and Q, formed: for display and for checks. What is computed here is computed from the factors."""
    reach, see = controllability_factor(A, B), observability_factor(A, C)
    return reach @ reach.conj().T, see @ see.conj().T


def controllability_factor(A: Array, B: Array) -> Array:
    """L_P of [n, k], k ≤ n the number of reachable directions that a double can tell from none."""
    return _diagonal_factor(A, B) if A.ndim == 1 else _dense_factor(A, B)


def observability_factor(A: Array, C: Array) -> Array:
    """L_Q: the controllability factor of the dual system (Aᴴ, Cᴴ)."""
    return controllability_factor(A.conj().T, C.conj().T)


def spectral_radius(A: Array) -> float:
    poles = A if A.ndim == 1 else np.linalg.eigvals(A)
    return float(np.abs(poles).max(initial=0.0))


def _diagonal_factor(poles: Array, B: Array) -> Array:
    poles, rest = poles.astype(complex), B.astype(complex)
    slack = (1 - np.abs(poles)) * (1 + np.abs(poles))
    first = _energy(rest, slack)
    found = []
    for _ in range(len(poles)):
        left = _energy(rest, slack)
        share = np.divide(left, first, out=np.zeros_like(left), where=first > 0)
        k = int(share.argmax())
        if share[k] < ROUNDING**2:
            break
        along = _turn_onto_first(rest, k)
        conjugate = 1 - np.conj(poles[k]) * poles
        found.append(along * np.sqrt(slack[k]) / conjugate)
        rest[:, 0] = along * (poles - poles[k]) / conjugate
        rest[k] = 0
    return np.stack(found, axis=1) if found else np.zeros((len(poles), 0), complex)


def _energy(B: Array, slack: Array) -> Array:
    """The diagonal of the Gramian."""
    return (B.real**2 + B.imag**2).sum(1) / slack


def _turn_onto_first(B: Array, k: int) -> Array:
    """Turn the basis of the inputs, in place, so that row k lies on its first axis; the first column."""
    if B.shape[1] > 1:
        row = B[k].conj()
        mirror = row.copy()
        phase = row[0] / abs(row[0]) if row[0] else 1.0
        mirror[0] += phase * np.linalg.norm(row)
        size = np.vdot(mirror, mirror).real
        B -= np.outer(B @ mirror, mirror.conj() * (2 / size))
    return B[:, 0].copy()


def _dense_factor(A: Array, B: Array) -> Array:
    factor, power = compressed(B), A
    for _ in range(DOUBLINGS):
        factor = compressed(np.hstack([factor, power @ factor]))
        if np.linalg.norm(power) ** 2 < np.finfo(float).eps:
            return factor
        power = power @ power
    return factor


def compressed(factor: Array) -> Array:
    """As many columns as rows at most, with the same product L Lᴴ."""
    if factor.shape[1] <= factor.shape[0]:
        return factor
    return np.asarray(np.linalg.qr(factor.conj().T, mode="r")).conj().T
