"""Example inputs from the command line: shapes with a kind of number and a range, or a Python expression.

1,3,224,224                     one positional tensor of normal floats
2,128:int64:0-30521             whole numbers from 0 up to 30521
input_ids=2,128:int64:0-30521   by keyword; several may be given
{"x": torch.randn(2, 3)}        what a Python expression gives: a dict by keyword, a tuple, one tensor
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Spec", "evaluated", "made", "spec"]

FORM = re.compile(r"(?:(\w+)=)?(\d+(?:,\d+)*)(?::(\w+)(?::(-?\d+)-(-?\d+))?)?")
RANGE = (0, 1)  # of whole numbers that say none: safe for the smallest vocabulary


@dataclass(frozen=True)
class Spec:
    """One tensor to be made."""

    name: str  # "": positional
    shape: tuple[int, ...]
    dtype: torch.dtype
    low: int
    high: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def tensor(self) -> Tensor:
        if self.dtype.is_floating_point:
            return torch.randn(self.shape, dtype=self.dtype)
        if self.dtype == torch.bool:
            return torch.ones(self.shape, dtype=torch.bool)
        return torch.randint(self.low, self.high + 1, self.shape, dtype=self.dtype)


def spec(text: str) -> Spec:
    """Parsed; argparse tells the user what was wrong."""
    found = FORM.fullmatch(text)
    shape = tuple(map(int, found[2].split(","))) if found else ()
    dtype = getattr(torch, (found and found[3]) or "float32", None)
    if found is None or 0 in shape or not isinstance(dtype, torch.dtype):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape: give sizes such as 1,3,224,224, or input_ids=2,128:int64:0-30521"
        )
    low, high = (int(found[4]), int(found[5])) if found[4] else RANGE
    if low > high:
        raise argparse.ArgumentTypeError(f"{text!r}: the range {low}-{high} is empty")
    return Spec(found[1] or "", shape, dtype, low, high)


def made(specs: Sequence[Spec]) -> Any:
    """A tuple of positional tensors, or a dict by keyword; ValueError for a mixture."""
    needed, there = sum(s.bytes for s in specs), _memory()
    if needed > there / 2:
        raise ValueError(
            f"the inputs would take {needed / 2**30:.3g} GiB, this machine has {there / 2**30:.3g}; a batch "
            "of 1 or 2 examples is enough"
        )
    named = [s for s in specs if s.name]
    if named and len(named) < len(specs):
        raise ValueError("--input: name all inputs or none")
    return {s.name: s.tensor() for s in named} if named else tuple(s.tensor() for s in specs)


def evaluated(expression: str) -> Any:
    """What a Python expression gives, with torch at hand; one tensor counts as positional."""
    value = eval(expression, {"torch": torch})
    return (value,) if isinstance(value, Tensor) else value


def _memory() -> float:
    """Bytes of this machine; endless where it does not say."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return math.inf
