"""Shapes that the cases share, and what a case is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor, nn

__all__ = ["IMAGE", "SEQUENCE", "VECTOR", "Cases"]

IMAGE, VECTOR, SEQUENCE = (2, 4, 8, 8), (3, 5), (2, 7, 5)

# name -> (factory, shape of the input or the tensor itself, sizes of the groups expected)
Cases: TypeAlias = dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | Tensor, list[int]]]
