"""Texts that are for people alone: what is written there changes nothing that the model computes.

torch._assert(x.dim() == 3, f"expected three dimensions, got {x.shape}")
"""

from __future__ import annotations

import ast
import linecache
from functools import lru_cache
from types import FrameType

__all__ = ["is_message"]

SHOWING = frozenset(
    ("_assert", "_check", "_check_value", "print", "warn", "warning", "warning_once", "info", "debug")
)


def is_message(frame: FrameType | None) -> bool:
    """Does the frame stand in the arguments of a call that checks, prints, logs or warns?"""
    if frame is None:
        return False
    return any(first <= frame.f_lineno <= last for first, last in _shown(frame.f_code.co_filename))


@lru_cache(maxsize=256)
def _shown(file: str) -> tuple[tuple[int, int], ...]:
    """First and last lines of such calls in the file."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except (SyntaxError, ValueError):
        return ()
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _name(node.func) in SHOWING]
    return tuple((call.lineno, call.end_lineno or call.lineno) for call in calls)


def _name(function: ast.expr) -> str:
    match function:
        case ast.Attribute(attr=name) | ast.Name(id=name):
            return name
        case _:
            return ""
