"""What has been measured on this machine, kept between runs: one JSON object per kind of measurement.

Files lie in `$XDG_CACHE_HOME/controlprune` (else `~/.cache/controlprune`), are replaced in one go, and a
file that is missing, corrupt or cannot be written only means measuring again. Delete them to do so.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

__all__ = ["device_name", "read_cache", "write_cache"]


def device_name(device: torch.device, dtype: torch.dtype) -> str:
    """What a time depends on besides the model: device, number type, torch version, threads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return f"{device.type} {name} {dtype} torch {torch.__version__} {torch.get_num_threads()} threads"


def read_cache(kind: str, folder: Path | None = None) -> dict[str, Any]:
    """Everything known of this kind: key -> value."""
    try:
        known = json.loads(_file(kind, folder).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def write_cache(kind: str, key: str, value: object, folder: Path | None = None) -> None:
    """Add one entry."""
    file = _file(kind, folder)
    known = {**read_cache(kind, folder), key: value}
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        partly = file.with_suffix(f".{os.getpid()}.part")
        partly.write_text(json.dumps(known), encoding="utf-8")
        partly.replace(file)


def _processor() -> str:
    """The CPU's model name; Linux tells it in a file, elsewhere Python knows it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _file(kind: str, folder: Path | None) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "controlprune"
    return (folder or home) / f"{kind}.json"
