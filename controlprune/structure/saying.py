"""Warnings that point at the user's own line, however deep in the package, or in torch, they come up."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

import torch

__all__ = ["warn"]

OURS = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent), contextlib.__file__)


def warn(message: str) -> None:
    """A UserWarning for who called."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(OURS):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
