"""The tasks, by name: each a factory of the folder that holds the data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..task import Task
from .graph import gcn, sage
from .images import images, scratch
from .language import language
from .text import text

__all__ = ["TASKS"]

TASKS: dict[str, Callable[[Path], Task]] = {
    "text": text,
    "images": images,
    "scratch": scratch,
    "language": language,
    "graph-sage": sage,
    "graph-gcn": gcn,
}
