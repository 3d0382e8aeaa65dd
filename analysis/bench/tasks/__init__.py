"""The tasks, by name: each a factory of the folder that holds the data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..task import Task
from .images import images, scratch
from .text import text

__all__ = ["TASKS"]

TASKS: dict[str, Callable[[Path], Task]] = {"text": text, "images": images, "scratch": scratch}
