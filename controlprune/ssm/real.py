"""The system that a layer with the output Re(C x) really is: real, of order 2n, and its reduction.

    x⁺ = Λ x + B u,  y = Re(C x)     Λ: [n] complex, B: [n, m], C: [p, n], u and y real

With the real state (Re x, Im x) of order 2n,

    A = [Re Λ, −Im Λ; Im Λ, Re Λ],   B = [Re B; Im B],   C = [Re C, −Im C]

and this is what is reduced, not (Λ, B, C): a pole and its conjugate are one mode to it, which the complex
system counts twice, and the bound 2 Σ_{i>m} σ_i over its 2n values is the bound for the real output.

Back in the layer's form a conjugate pair λ, λ̄ of the reduced system is one complex state (C doubled), a
real pole is one complex state whose imaginary part is idle; so m orders take ⌈m/2⌉ states or a few more.

The Gramian's factor comes from the conjugate-closed system (Λ, Λ̄): with (x; x̄) = G (Re x; Im x),
L_P = G⁻¹ L and L_Q = Gᴴ L, made real by P = Re L_P Re L_Pᵀ + Im L_P Im L_Pᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .balanced import Balancing, balancing_of_factors, check_system
from .diagonal import Modal, diagonalised
from .gramians import Array, compressed, controllability_factor, observability_factor

__all__ = ["Reduction", "padded", "real_balancing", "real_order", "real_reduction", "real_system"]

PAIRED = 1e-9  # |Im λ| up to which a pole counts as real: LAPACK's pairs of a real matrix are exact


@dataclass(frozen=True, eq=False)
class Reduction:
    """A layer's system at fewer states, and how its states stand to the old ones.

    S and R are over the real states (Re x; Im x): x ≈ S x̂, x̂ = R x.
    """

    poles: Array  # [r]
    B: Array  # [r, m]
    C: Array  # [p, r]
    order: int  # of the balanced system that was kept: real for a real output
    bound: float  # H∞: 2 Σ σ of what left, and what the diagonal form adds (measured)
    S: Array  # [2n, 2r] real
    R: Array  # [2r, 2n] real

    @property
    def states(self) -> int:
        return len(self.poles)


def real_system(poles: Array, B: Array, C: Array) -> tuple[Array, Array, Array]:
    """(A, B, C) of order 2n, real."""
    a, b = np.diag(poles.real), np.diag(poles.imag)
    return np.block([[a, -b], [b, a]]), np.vstack([B.real, B.imag]), np.hstack([C.real, -C.imag])


def real_balancing(poles: Array, B: Array, C: Array) -> Balancing:
    """Hankel singular values (2n of them) and balanced coordinates of y = Re(C x)."""
    check_system(poles, B, C)
    both = np.concatenate([poles, poles.conj()])
    reach = controllability_factor(both, np.vstack([B, B.conj()]))
    see = observability_factor(both, np.hstack([C, C.conj()]) / 2)
    up, down = np.split(reach, 2)
    reach = np.vstack([up + down, -1j * (up - down)]) / 2
    up, down = np.split(see, 2)
    see = np.vstack([up + down, -1j * (up - down)])
    return balancing_of_factors(*real_system(poles, B, C), _real(reach), _real(see))


def _real(factor: Array) -> Array:
    return compressed(np.hstack([factor.real, factor.imag]))


def real_reduction(found: Balancing, states: int, precision: float) -> Reduction:
    """The largest balanced truncation that fits into `states` complex states."""
    order = min(2 * states, found.rank)
    while True:
        modal = diagonalised(*found.truncated(order), precision)
        pairs, single = _kinds(modal.poles)
        if (len(pairs) + len(single) <= states and not _between_equals(found, order)) or order == 1:
            return _as_states(found, modal, order, pairs, single)
        order -= 1


def real_order(found: Balancing, tolerance: float, precision: float) -> int:
    """How many complex states the truncation by tolerance takes."""
    modal = diagonalised(*found.truncated(found.order(tolerance)), precision)
    return sum(map(len, _kinds(modal.poles)))


def padded(small: Reduction, states: int) -> Reduction:
    """With idle states at λ = 0 that hear the input and are not heard, up to `states` of them."""
    idle = states - small.states
    if not idle:
        return small
    if small.poles.ndim == 2:
        raise ValueError(f"states={states}: the system has only {small.states} that matter")
    n, m, p = len(small.S), small.B.shape[1], small.C.shape[0]
    into_re, into_im = np.split(small.S, 2, axis=1)
    out_re, out_im = np.split(small.R, 2)
    nowhere, nothing = np.zeros((n, idle)), np.zeros((idle, n))
    return Reduction(
        np.concatenate([small.poles, np.zeros(idle)]),
        np.vstack([small.B, np.full((idle, m), m**-0.5)]),
        np.hstack([small.C, np.zeros((p, idle))]),
        small.order,
        small.bound,
        np.hstack([into_re, nowhere, into_im, nowhere]),
        np.vstack([out_re, nothing, out_im, nothing]),
    )


def _between_equals(found: Balancing, order: int) -> bool:
    return order < found.rank and found.values[order] > 0.999999 * found.values[order - 1]


def _kinds(poles: Array) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Positions of the upper halves of conjugate pairs, and of real poles."""
    real = np.abs(poles.imag) <= PAIRED
    return np.flatnonzero(~real & (poles.imag > 0)), np.flatnonzero(real)


def _as_states(
    found: Balancing, modal: Modal, order: int, pairs: NDArray[np.intp], single: NDArray[np.intp]
) -> Reduction:
    S, R = found.projection(order)
    pick = np.concatenate([pairs, single]).astype(int)
    into, out = S @ modal.V[:, pick], modal.inverse[pick] @ R
    B, C = modal.B[pick], modal.C[:, pick]
    alone = np.arange(len(pick)) >= len(pairs)
    C, into = np.where(alone, C, 2 * C), np.where(alone, into, 2 * into)
    scale = _gauge(modal.poles[pick], B, C, alone)
    B, C, into, out = B * scale[:, None], C / scale, into / scale, out * scale[:, None]
    return Reduction(
        modal.poles[pick],
        B,
        C,
        order,
        found.bound(order) + modal.error,
        np.hstack([into.real, -into.imag]),
        np.vstack([out.real, out.imag]),
    )


def _gauge(poles: Array, B: Array, C: Array, alone: NDArray[np.bool_]) -> Array:
    """x_i → s_i x_i changes nothing outside: make ‖b_i‖ / √(1 − |λ_i|²) = ‖c_i‖, a state's two halves alike.

    A real mode is given the phase π/4: at phase 0 the gradients of its imaginary parts are exactly zero,
    and the idle half of its state could never learn.
    """
    slack = np.sqrt((1 - np.abs(poles)) * (1 + np.abs(poles)))
    enters, leaves = np.linalg.norm(B, axis=1) / slack, np.linalg.norm(C, axis=0)
    size = np.sqrt(np.divide(leaves, enters, out=np.ones_like(leaves), where=(enters > 0) & (leaves > 0)))
    return size * np.where(alone, np.exp(0.25j * np.pi), 1.0)
