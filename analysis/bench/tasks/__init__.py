"""The tasks, by name: each a factory of the folder that holds the data and, if not its own, of the length."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from ..task import Task
from .graph import gcn, sage
from .images import images, scratch
from .language import language
from .text import text

__all__ = ["TASKS"]


class Make(Protocol):
    def __call__(self, data: Path, steps: int = ...) -> Task: ...


TASKS: dict[str, Make] = {
    "text": text,
    "images": images,
    "scratch": scratch,
    "language": language,
    "graph-sage": sage,
    "graph-gcn": gcn,
}
