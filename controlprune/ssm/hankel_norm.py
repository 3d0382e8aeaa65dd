"""Σ σ of a layer, to train with: what makes a state-space layer compressible.

    penalty = Σ_i σ_i,   σ the Hankel singular values          (their sum: the Hankel operator's nuclear norm)
    dΣσ = ½ tr(Rᴴ R dP) + ½ tr(S Sᴴ dQ)                        S, R: balanced coordinates, R P Rᴴ = Sᴴ Q S = Σ

so with S and R held, ½ tr(R P Rᴴ) + ½ tr(Sᴴ Q S) has the value Σ σ and its gradient, through Gramians in
closed form; no derivative of a singular value decomposition, which breaks down where two values meet. For
diagonal A, of y = C x, and of the real system where y = Re(C x). Source of the use: Hankel regularisation,
arXiv 2510.22951. One evaluation costs as much as a look at the values does; every tenth step is enough.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from .layer import StateSpace, System
from .reduce import spectrum

__all__ = ["hankel_norm"]


def hankel_norm(layer: nn.Module) -> Tensor:
    """Σ σ of the layer's systems, differentiable in its parameters."""
    if not isinstance(layer, StateSpace):
        raise ValueError(f"layer: {type(layer).__name__} does not give system() and parameters_for()")
    system: System = layer.system()
    batched = system[1].ndim == 3
    if system[0].ndim - batched == 2:
        raise ValueError("layer: its A is dense; the regulariser is for diagonal ones")
    found = spectrum(system, layer.real_output)
    A, B, C = (x.to(torch.complex128) if batched else x.to(torch.complex128)[None] for x in system)
    if found.real_output:
        A, B, C = torch.cat([A, A.conj()], 1), torch.cat([B, B.conj()], 1), torch.cat([C, C.conj()], 2) / 2
    total = torch.zeros((), dtype=torch.float64, device=B.device)
    for one, poles, enters, leaves in zip(found.systems, A, B, C, strict=True):
        S, R = one.projection(one.rank)
        if found.real_output:  # from (Re x; Im x) to (x; x̄)
            up, down = np.split(S, 2)
            left, right = np.split(R, 2, axis=1)
            S = np.vstack([up + 1j * down, up - 1j * down])
            R = np.hstack([left - 1j * right, left + 1j * right]) / 2
        S, R = (torch.as_tensor(x, device=B.device).to(poles.dtype) for x in (S, R))
        apart = 1 - poles[:, None] * poles.conj()
        P, Q = enters @ enters.mH / apart, leaves.mH @ leaves / apart.conj()
        total = total + ((R @ P) * R.conj()).sum().real / 2 + ((Q @ S) * S.conj()).sum().real / 2
    return total
