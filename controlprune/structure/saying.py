"""What is said to people.

Warnings point at the user's own line, however deep they come up. Text only shows: names of modules and lines
of files may be a stranger's, and hold what a terminal obeys.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

import torch

__all__ = ["printable", "warn"]

OURS = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent), contextlib.__file__)


def warn(message: str) -> None:
    """A UserWarning for who called."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(OURS):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def printable(text: str) -> str:
    """The text with everything that does not print (escape sequences, directions of writing) spelt out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
