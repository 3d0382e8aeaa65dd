"""A dense system in diagonal form, also where no diagonal form is near.

    A = V Λ V⁻¹:   λ = diag Λ,  B ← V⁻¹ B,  C ← C V        columns of V of unit length

Diagonalisable matrices are dense among all, so a diagonal system is always near; but close to a defective
A, V is ill-conditioned and what is left of the digits of (B, C) is u cond(V), with u the precision that the
parameters will have. Moving A by ε‖A‖ parts its eigenvalues: at a Jordan block of size k, cond(V) falls to
about ε^(1/k − 1) while the response moves by about ε. Neither is known beforehand, so a few ε are tried
(the same random direction, real where A is) and the one is taken whose response, rounded to u, is nearest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .gramians import Array

__all__ = ["Modal", "diagonalised", "frequency_response", "largest_gain"]

WELL = (
    1e4  # cond(V) up to which no other A is tried: four of a double's sixteen digits, one of a float's seven
)
FREQUENCIES = 128


@dataclass(frozen=True, eq=False)
class Modal:
    """x⁺ = λ x + B u, y = C x with complex states; x = V⁻¹ times the dense system's state."""

    poles: Array  # [n] complex
    B: Array  # [n, m]
    C: Array  # [p, n]
    V: Array  # [n, n]
    inverse: Array
    error: float  # largest gain, over a grid of frequencies, of what the dense response differs by


def diagonalised(A: Array, B: Array, C: Array, precision: float = float(np.finfo(float).eps)) -> Modal:
    """The diagonal system nearest to (A, B, C) among those tried, its parameters rounded to `precision`."""
    plain = _modal(A, B, C)
    if np.linalg.cond(plain.V) <= WELL:
        return plain
    draw = np.random.default_rng(0)
    push = draw.normal(size=A.shape) + (1j * draw.normal(size=A.shape) if np.iscomplexobj(A) else 0)
    push *= np.linalg.norm(A, 2) / np.linalg.norm(push, 2)
    tried = [plain, *(_modal(A + precision**power * push, B, C) for power in (1, 3 / 4, 2 / 3, 1 / 2))]
    measured = [_measured(modal, A, B, C, precision) for modal in tried if spectral_below_one(modal)]
    return min(measured or [plain], key=lambda modal: modal.error)


def spectral_below_one(modal: Modal) -> bool:
    return bool(np.abs(modal.poles).max(initial=0.0) < 1)


def frequency_response(A: Array, B: Array, C: Array, count: int = FREQUENCIES) -> Array:
    """C (zI − A)⁻¹ B at `count` points of the unit circle, half at the slowest poles: [count, p, m]."""
    z = _points(A if A.ndim == 1 else np.linalg.eigvals(A), count)
    return _response(A, B, C, z)


def largest_gain(response: Array) -> float:
    """Largest singular value over all frequencies of [count, p, m]."""
    return float(np.linalg.norm(response, 2, axis=(1, 2)).max(initial=0.0))


def _points(poles: Array, count: int) -> Array:
    slowest = np.angle(poles[np.argsort(-np.abs(poles))])[: count // 2]
    even = np.linspace(0, 2 * np.pi, count - len(slowest), endpoint=False)
    return np.exp(1j * np.concatenate([even, slowest]))


def _response(A: Array, B: Array, C: Array, z: Array) -> Array:
    if A.ndim == 1:
        return np.einsum("pn,zn,nm->zpm", C, 1 / (z[:, None] - A), B, optimize=True)
    return C @ np.linalg.solve(z[:, None, None] * np.eye(len(A)) - A, B[None])


def _modal(A: Array, B: Array, C: Array) -> Modal:
    poles, V = np.linalg.eig(A)
    poles, V = poles.astype(complex), V.astype(complex)
    inverse = np.linalg.pinv(V) if np.linalg.cond(V) > 1e15 else np.linalg.inv(V)
    return Modal(poles, inverse @ B, C @ V, V, inverse, 0.0)


def _measured(modal: Modal, A: Array, B: Array, C: Array, precision: float) -> Modal:
    """With the response's error after noise of the given precision on every parameter."""
    draw = np.random.default_rng(1)
    noise = [1 + precision * draw.normal(size=x.shape) for x in (modal.poles, modal.B, modal.C)]
    rough = [x * e for x, e in zip((modal.poles, modal.B, modal.C), noise, strict=True)]
    z = _points(modal.poles, FREQUENCIES)
    error = largest_gain(_response(rough[0], rough[1], rough[2], z) - _response(A, B, C, z))
    return Modal(modal.poles, modal.B, modal.C, modal.V, modal.inverse, error)
