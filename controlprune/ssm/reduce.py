"""A layer's system at fewer states, and how parameters of the small one stand to those of the large one.

    x ≈ S x̂,  x̂ = R x,  R S = I;      Â = R A S,  B̂ = R B,  Ĉ = C S

Read backwards, to first order and with S and R held, a movement of the small system is one of the large:

    dA = S dÂ R,   dB = S dB̂,   dC = dĈ R

A diagonal layer (in the coordinates (x; x̄), see `real.py`) has no such dA, but the same response moves so
with its eigenvalues and eigenvectors:

    dλ_j = dA_jj,   X_jk = dA_jk / (λ_k − λ_j),   dB = S dB̂ − X B,   dC = dĈ R + C X

which is φ of `moments.py`. Averages of gradients go through all of it. Averages of their squares leave X
out: it adds up many strongly correlated entries with large factors of both signs. (Against the true gradient
after the cut, LRU of 48 states to 12, 24, 40: carried gradients have cosines of 0.6 to 1.0; carried squares
came out 2 to 15 times too large with X, 0.4 to 2.3 times without.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .balanced import Balancing, balancing
from .diagonal import diagonalised
from .gramians import Array
from .layer import System
from .real import Reduction, padded, real_balancing, real_order, real_reduction

TOGETHER = 1e-3  # distance of two poles from which they count as one: between those eigenvectors are nobody's

__all__ = ["Spectrum", "embedding", "reduced", "spectrum", "states_for"]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Balanced coordinates of every system of a layer (one, unless it has a batch of them)."""

    systems: tuple[Balancing, ...]
    batched: bool
    real_output: bool
    precision: float  # of the layer's parameters

    @property
    def values(self) -> Array:
        """Hankel singular values, [systems, order]: of the real system (2n) where the output is Re(C x)."""
        return np.stack([s.values for s in self.systems])

    @property
    def diagonal(self) -> bool:
        return self.real_output or self.systems[0].A.ndim == 1


def spectrum(system: System, real_output: bool) -> Spectrum:
    """Hankel singular values of a layer; the complex dense system if a dense A comes with Re(C x)."""
    A, B, C = (x.detach().cpu().numpy() for x in system)
    precision = float(np.finfo(B.dtype).eps)
    batched = B.ndim == 3
    wide = [x.astype(np.complex128 if np.iscomplexobj(x) else np.float64) for x in (A, B, C)]
    each = list(zip(*wide, strict=True)) if batched else [tuple(wide)]
    real = real_output and each[0][0].ndim == 1
    found = tuple((real_balancing if real else balancing)(*one) for one in each)
    return Spectrum(found, batched, real, precision)


def states_for(found: Spectrum, tolerance: float) -> int:
    """The fewest states with which every system keeps (1 − tolerance) Σ σ."""
    if not found.real_output:
        return max(one.order(tolerance) for one in found.systems)
    return max(real_order(one, tolerance, found.precision) for one in found.systems)


def reduced(found: Spectrum, states: int) -> tuple[Reduction, ...]:
    """Every system at exactly `states` states (what it has too few of is idle)."""
    if found.real_output:
        each = (real_reduction(one, states, found.precision) for one in found.systems)
    else:
        each = (_plain(one, states, found.precision) for one in found.systems)
    return tuple(padded(one, states) for one in each)


def _plain(one: Balancing, states: int, precision: float) -> Reduction:
    """Of a system whose output is C x itself: dense stays dense, diagonal is made diagonal again."""
    order = min(states, one.rank)
    S, R = one.projection(order)
    A, B, C = one.truncated(order)
    if one.A.ndim == 2:
        return Reduction(A, B, C, order, one.bound(order), S, R)
    modal = diagonalised(A, B, C, precision)
    S, R = S @ modal.V, modal.inverse @ R
    into, out = np.vstack([S, -1j * S]), np.hstack([R, 1j * R])
    bound = one.bound(order) + modal.error
    real_into, real_out = np.hstack([into.real, -into.imag]), np.vstack([out.real, out.imag])
    return Reduction(modal.poles, modal.B, modal.C, order, bound, real_into, real_out)


def embedding(
    old: System, new: System, small: tuple[Reduction, ...], batched: bool, turned: bool
) -> Callable[[System], System]:
    """(A, B, C) of the large layer as a function of those of the small one, at which `new` gives `old`.

    `turned`: movements of eigenvectors (X) too.
    """
    device = old[1].device
    S, R = (
        torch.as_tensor(np.stack(x), device=device) for x in zip(*((s.S, s.R) for s in small), strict=True)
    )
    lift = (lambda x: x) if batched else (lambda x: x[None])
    drop = (lambda x: x) if batched else (lambda x: x[0])
    large = tuple(lift(x) for x in old)

    def back(system: System) -> System:
        step = tuple(lift(now - then) for now, then in zip(system, new, strict=True))
        dense = large[0].ndim == 3
        moved = _dense_move(S, R, step) if dense else _diagonal_move(S, R, step, large, turned)
        A, B, C = (then + drop(by) for then, by in zip(old, moved, strict=True))
        return A, B, C

    return back


def _dense_move(S: Tensor, R: Tensor, step: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    dA, dB, dC = (x.to(S.dtype) for x in step)
    return S @ dA @ R, S @ dB, dC @ R


def _diagonal_move(
    S: Tensor, R: Tensor, step: tuple[Tensor, ...], old: tuple[Tensor, ...], turned: bool
) -> tuple[Tensor, ...]:
    """dλ, dB, dC of the diagonal layer, from those of the small one."""
    dA, dB, dC = step
    poles, B, C = old
    n = poles.shape[1]
    a, b = torch.diag_embed(dA.real), torch.diag_embed(dA.imag)
    block = torch.cat([torch.cat([a, -b], 2), torch.cat([b, a], 2)], 1).to(poles.dtype)
    up, down = S.split(n, 1)
    left, right = R.split(n, 2)
    into = torch.cat([torch.complex(up, down), torch.complex(up, -down)], 1)
    out = torch.cat([torch.complex(left, -right), torch.complex(left, right)], 2) / 2
    rows, columns = S @ torch.cat([dB.real, dB.imag], 1), torch.cat([dC.real, -dC.imag], 2) @ R
    rows, columns = torch.complex(*rows.split(n, 1)), torch.complex(columns[..., :n], -columns[..., n:])
    if not turned:
        return ((into[:, :n] @ block) * out[..., :n].mT).sum(2), rows, columns
    moved = into @ block @ out
    both = torch.cat([poles, poles.conj()], 1)
    apart = both[:, None, :] - both[:, :, None]
    X = moved * apart.conj() / (apart.abs() ** 2 + TOGETHER**2)
    rows = rows - (X @ torch.cat([B, B.conj()], 1))[:, :n]
    columns = columns + (torch.cat([C, C.conj()], 2) @ X)[..., :n]
    return moved.diagonal(dim1=1, dim2=2)[:, :n], rows, columns
