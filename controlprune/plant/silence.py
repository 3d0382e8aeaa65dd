"""Zeros at some positions of a tensor, in one pass over its memory: the bits there are and-ed away.

    bits(x) ← bits(x) & m        m_j = 0 where position j is silent, else −1 (every bit), along its dimension

Exact whatever stands there (a product with 0 would keep what is not finite). Along a dimension that is not
the first, it takes a tenth of the time of `index_fill_`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cuts import Index

__all__ = ["Silence"]

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a number


class Silence:
    """The positions that are zero, by dimension."""

    def __init__(self, silent: Index) -> None:
        self.silent = silent
        self._masks: dict[tuple[torch.dtype, torch.device, int], list[Tensor]] = {}

    def fill_(self, tensor: Tensor) -> Tensor:
        bits = _bits(tensor)
        for mask in self._of(bits, tensor):
            bits &= mask
        return tensor

    def filled(self, tensor: Tensor) -> Tensor:
        """Another tensor; one that is differentiated through stays so."""
        if torch.is_grad_enabled() and tensor.requires_grad:
            for dim, index in self.silent.items():
                tensor = tensor.index_fill(dim, index, 0)
            return tensor
        bits = _bits(tensor)
        for mask in self._of(bits, tensor):
            bits = bits & mask
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        found = bits.view(real.dtype)
        return torch.view_as_complex(found) if tensor.is_complex() else found

    def _of(self, bits: Tensor, tensor: Tensor) -> list[Tensor]:
        key = bits.dtype, bits.device, bits.ndim
        if key not in self._masks:
            self._masks[key] = [self._mask(dim, index, tensor, bits) for dim, index in self.silent.items()]
        return self._masks[key]

    @staticmethod
    def _mask(dim: int, index: Tensor, tensor: Tensor, bits: Tensor) -> Tensor:
        mask = torch.full((tensor.shape[dim],), -1, dtype=bits.dtype, device=bits.device)
        mask[index] = 0
        return mask.view([-1 if d == dim else 1 for d in range(bits.ndim)])


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's own memory, as whole numbers."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.view(BITS[real.element_size()])
