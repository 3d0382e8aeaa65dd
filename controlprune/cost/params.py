"""Number of parameters, as a polynomial in the widths.

`C(n) = Σ_parameters Π_dims size(extent)(n)`, in elements (of entries: how many are on); shared parameters
count once, buffers not at all. It equals `sum(p.numel() for p in model.parameters())` of the shrunk model.
"""

from __future__ import annotations

from ..structure.groups import Structure
from .polynomial import Polynomial

__all__ = ["parameters"]


def parameters(structure: Structure) -> Polynomial:
    """Parameter elements over the structure's groups."""
    entries = {name: (extent,) for name, extent in structure.entries.items()}
    terms = ((1.0, entries.get(name, structure.tensors[name])) for name in sorted(structure.parameters))
    return Polynomial.of(terms, len(structure.groups))
