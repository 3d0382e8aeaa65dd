"""Which width multiples this device runs well: a short measurement, kept in a cache file.

Kernels work on blocks of m channels, so that every width in (w − m, w] costs what w costs. With t(n) the
time of a convolution n -> n, forward and backward, at the widths just above and just below a block end W,

    m is a block if  min t(W − m + 1 … W − 1)  >=  (1 − TOLERANCE) · t(W)   and   t(W − m) < that,

and the multiple is the largest such m (1: none). Times are the best of several, in seconds of process CPU
time (CPU) or by events (CUDA). One file per device, dtype, torch version and thread count, so that the same
machine gives the same widths, hence the same run; delete it, or give `round_to`, to choose otherwise.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F

__all__ = ["block", "preferred_multiple"]

WIDTH, MULTIPLES, TOLERANCE = 64, (16, 8, 4), 0.08


def block(times: Mapping[int, float], width: int = WIDTH) -> int:
    """The largest multiple that `times` (width -> seconds) shows to be a block ending at `width`."""
    floor = (1.0 - TOLERANCE) * times[width]
    for m in MULTIPLES:
        inside = [t for n, t in times.items() if width - m < n < width]
        if inside and min(inside) >= floor > times[width - m]:
            return m
    return 1


def preferred_multiple(device: torch.device, dtype: torch.dtype, cache: Path | None = None) -> int:
    """The measured multiple of `device` at `dtype`; measured once (well under a second), then read."""
    file = (cache or _cache()) / "rounding.json"
    key = _key(device, dtype)
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if not (isinstance(known, dict) and isinstance(known.get(key), int)):
        known = known if isinstance(known, dict) else {}
        known[key] = block(_measure(device, dtype))
        file.parent.mkdir(parents=True, exist_ok=True)
        partly = file.with_suffix(f".{os.getpid()}.part")
        partly.write_text(json.dumps(known), encoding="utf-8")
        partly.replace(file)
    return known[key]


def _measure(device: torch.device, dtype: torch.dtype) -> dict[int, float]:
    widths = sorted({WIDTH, *(WIDTH - m for m in MULTIPLES), *(WIDTH - m + 1 for m in MULTIPLES), WIDTH - 1})
    runs = {n: _convolution(n, device, dtype) for n in widths}
    with torch.random.fork_rng(devices=[]):
        best = dict.fromkeys(widths, float("inf"))
        for _ in range(8):  # in turn, so that a busy moment hits all
            for n, run in runs.items():
                best[n] = min(best[n], _seconds(run, device))
    return best


def _convolution(n: int, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    x = torch.ones(8, n, 16, 16, device=device, dtype=dtype, requires_grad=True)
    w = torch.ones(n, n, 3, 3, device=device, dtype=dtype, requires_grad=True)
    return lambda: F.conv2d(x, w, padding=1).sum().backward()


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cpu":
        began = time.process_time()
        run()
        return time.process_time() - began
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _key(device: torch.device, dtype: torch.dtype) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return f"{device.type} {name} {dtype} torch {torch.__version__} {torch.get_num_threads()} threads"


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "controlprune"
