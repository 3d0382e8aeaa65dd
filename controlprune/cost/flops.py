"""FLOPs of one forward pass on the example inputs, as a polynomial in the widths.

`C(n) = Σ_operators coefficient × Π size(factor)(n)`, a multiply-add counted as 2, exactly as torch's
FlopCounterMode counts the shrunk model; operators it does not count (element-wise, norms, pooling) are 0.
Source: the traced operators in `Structure.work`.
"""

from __future__ import annotations

from ..structure.groups import Structure
from .polynomial import Polynomial

__all__ = ["flops"]


def flops(structure: Structure) -> Polynomial:
    """FLOPs over the structure's groups."""
    terms = ((float(work.coefficient), work.factors) for work in structure.work)
    return Polynomial.of(terms, len(structure.groups))
