"""Balanced truncation of a stable discrete-time system, real or complex, diagonal or dense.

    σ = svd(L_Qᴴ L_P) = U Σ Vᴴ          Hankel singular values (Gramian factors: gramians.py)
    S = L_P V_r Σ_r^−½,  R = (L_Q U_r Σ_r^−½)ᴴ made exactly biorthogonal, R S = I
    Â = R A S,  B̂ = R B,  Ĉ = C S
    ‖C (zI − A)⁻¹ B − Ĉ (zI − Â)⁻¹ B̂‖_∞ ≤ 2 Σ_{i>r} σ_i                             (Glover 1984; Enns 1984)

σ is never taken as √eig(P Q): a double carries eigenvalues to ε σ₁², and with them values only to √ε σ₁.
States whose σ lies under rounding (n ε σ₁) are nobody's: they are never kept.

Arrays are numpy's or torch's; what comes in double or single goes out so, computed in double on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from .diagonal import diagonalised
from .gramians import Array, controllability_factor, observability_factor, spectral_radius

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = [
    "Balancing",
    "balanced_truncation",
    "balancing",
    "balancing_of_factors",
    "check_system",
    "error_bound",
    "hankel_singular_values",
]

Both = TypeVar("Both", "ArrayLike", Tensor)


@dataclass(frozen=True, eq=False)
class Balancing:
    """A system and its balanced coordinates: everything that a truncation to any order needs."""

    A: Array  # [n] or [n, n]
    B: Array  # [n, m]
    C: Array  # [p, n]
    values: Array  # σ, n of them, falling; zero where the system has fewer
    into: Array  # V Σ^−½ columns of S, [n, rank]
    out: Array  # the rows of R before they are made biorthogonal, [rank, n]

    @property
    def rank(self) -> int:
        """How many states a double can tell from none."""
        return self.into.shape[1]

    def bound(self, order: int) -> float:
        """2 Σ_{i>order} σ_i: what the H∞ error is at most."""
        return 2 * float(self.values[order:].sum())

    def order(self, tolerance: float) -> int:
        """The smallest order that keeps (1 − tolerance) Σ σ, never in the midst of equal values."""
        kept = np.cumsum(self.values)
        wanted = int(np.searchsorted(kept, (1 - tolerance) * kept[-1] * (1 - 1e-12))) + 1
        wanted = max(1, min(wanted, self.rank))
        while wanted < self.rank and self.values[wanted] > 0.999999 * self.values[wanted - 1]:
            wanted += 1
        return wanted

    def projection(self, order: int) -> tuple[Array, Array]:
        """S [n, order] and R [order, n], R S = I."""
        S, rows = self.into[:, :order], self.out[:order]
        return S, np.linalg.solve(rows @ S, rows)

    def truncated(self, order: int) -> tuple[Array, Array, Array]:
        """Â [order, order], B̂, Ĉ, balanced to rounding."""
        S, R = self.projection(order)
        step = self.A[:, None] * S if self.A.ndim == 1 else self.A @ S
        return R @ step, R @ self.B, self.C @ S


def balancing(A: Array, B: Array, C: Array) -> Balancing:
    """Hankel singular values and balanced coordinates of (A, B, C); an error if it is not stable."""
    check_system(A, B, C)
    return balancing_of_factors(A, B, C, controllability_factor(A, B), observability_factor(A, C))


def balancing_of_factors(A: Array, B: Array, C: Array, reach: Array, see: Array) -> Balancing:
    """The same from factors of the Gramians, P = reach reachᴴ and Q = see seeᴴ."""
    left, found, right = np.linalg.svd(see.conj().T @ reach, full_matrices=False)
    n = len(A)
    values = np.zeros(n)
    values[: len(found)] = found
    rank = int((found > n * np.finfo(float).eps * found.max(initial=0.0)).sum())
    root = np.sqrt(found[:rank])
    return Balancing(
        A,
        B,
        C,
        values,
        reach @ (right[:rank].conj().T / root),
        (left[:, :rank] / root).conj().T @ see.conj().T,
    )


@overload
def hankel_singular_values(A: Tensor, B: Tensor, C: Tensor) -> Tensor: ...
@overload
def hankel_singular_values(A: ArrayLike, B: ArrayLike, C: ArrayLike) -> Array: ...
def hankel_singular_values(A: ArrayLike | Tensor, B: ArrayLike | Tensor, C: ArrayLike | Tensor):
    """σ₁ ≥ … ≥ σ_n of x⁺ = A x + B u, y = C x: what each state of the balanced system passes on.

    A is [n] (diagonal) or [n, n], B [n, m], C [p, n], real or complex, stable.
    """
    a, b, c = (_array(x) for x in (A, B, C))
    check_system(a, b, c)
    found = np.zeros(len(a))
    reach, see = controllability_factor(a, b), observability_factor(a, c)
    values = np.linalg.svd(see.conj().T @ reach, compute_uv=False)
    found[: len(values)] = values
    return _like(found, A)


def error_bound(values: ArrayLike | Tensor, r: int) -> float:
    """2 Σ_{i>r} σ_i, the largest H∞ error of a truncation to r states."""
    return 2 * float(_array(values).real[r:].sum())


def balanced_truncation(A: Both, B: Both, C: Both, D: Both, r: int) -> tuple[Both, Both, Both, Both]:
    """The balanced truncation of (A, B, C, D) to r states.

    A dense A gives a dense one, balanced. A diagonal one ([n]) gives a diagonal one ([r], complex): the
    truncated system is diagonalised again. Of a system with fewer than r states that are both reached
    and seen, those are returned.
    """
    a, b, c = (_array(x) for x in (A, B, C))
    if not 1 <= r <= len(a):
        raise ValueError(f"r={r}: give a number of states between 1 and {len(a)}")
    found = balancing(a, b, c)
    system = found.truncated(min(r, found.rank))
    if a.ndim == 1:
        modal = diagonalised(*system)
        system = (modal.poles, modal.B, modal.C)
    small_a, small_b, small_c = (_like(x, A) for x in system)
    return small_a, small_b, small_c, D


def check_system(A: Array, B: Array, C: Array) -> None:
    """An error that says what is wrong with it, if it has no Gramians."""
    n = len(A)
    if A.shape not in ((n,), (n, n)) or B.ndim != 2 or C.ndim != 2 or B.shape[0] != n or C.shape[1] != n:
        raise ValueError(
            f"A, B, C have shapes {A.shape}, {B.shape}, {C.shape}; give [n] or [n, n], [n, m] and [p, n]"
        )
    if not all(np.isfinite(x).all() for x in (A, B, C)):
        raise ValueError("A, B, C: not finite")
    if (radius := spectral_radius(A)) >= 1:
        raise ValueError(f"A: its largest eigenvalue has |λ| = {radius:.6g}; a Gramian exists below 1 only")


def _array(x: ArrayLike | Tensor) -> Array:
    found = x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
    return found.astype(np.complex128 if np.iscomplexobj(found) else np.float64)


def _like(x: Array, model: ArrayLike | Tensor) -> Any:
    """`x` as torch or numpy, in the precision of `model`."""
    if isinstance(model, Tensor):
        double = model.dtype in (torch.float64, torch.complex128)
        kind = {True: (torch.complex64, torch.complex128), False: (torch.float32, torch.float64)}
        return torch.as_tensor(x).to(model.device, kind[np.iscomplexobj(x)][double])
    single = np.asarray(model).dtype in (np.float32, np.complex64)
    return x.astype(np.complex64 if np.iscomplexobj(x) else np.float32) if single else x
