"""Which width multiples this device runs well: a short measurement, kept in a cache file.

Kernels work on blocks of m channels, so that every width in (w − m, w] costs what w costs. With t(n) the
time of a convolution n -> n, forward and backward, at the widths just above and just below a block end W,

    m is a block if  t(W) − t(W − m) >= RISE · t(W)          (the step is worth the name)
               and   t(n) − t(W − m) >= EARLY · (t(W) − t(W − m))    for n in (W − m, W)

(a cost that rises evenly has only 1/m of the rise at W − m + 1: `EARLY` lies between that and the 1 of a
stair), and the multiple is the largest such m (1: none). Six measurements on a busy core (torch 2.13): at the
block of 16 a rise of 0.37 to 0.46, and 0.67 to 1.06 of it early; at 8 and 4, which are none, five times −0.05
to −0.02 and once 0.15, with at most 0.1 of it early.

Times are the best of several, in seconds of process CPU time (CPU) or of the clock (CUDA). One entry per
device, dtype, torch version and thread count, so that the same machine gives the same widths, hence the same
run; delete the file, or give `round_to`, to choose otherwise.

It is for groups of at least `WIDTH` units that convolutions read: for linear layers no multiple was seen to
help, and in a narrow group it would leave too few widths to choose from. Where the clock itself is under
budget (`timed`), it is for every group wider than a block that convolutions read or write: there a width
between two block ends costs what the upper one does, and no model of the time that rises evenly can tell.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..structure.groups import Group, Structure
from .cache import device_name, read_cache, write_cache

__all__ = ["Steps", "ascending", "block", "group_multiples", "ladder", "preferred_multiple", "width_steps"]

WIDTH, MULTIPLES, RISE, EARLY = 64, (16, 8, 4), 0.08, 0.55
BATCH = {"cpu": 8, "cuda": 256}  # enough work that a kernel's launch does not hide it


def group_multiples(
    structure: Structure, tensors: Mapping[str, Tensor], *, timed: bool = False
) -> tuple[int, ...]:
    """Per group, the multiple that the device of its layers runs well; 1 where none is known to matter.

    Not where processes train together: they could find different ones.
    """
    found = []
    for group in structure.groups:
        weight = _convolution(group, structure, tensors, timed)
        multiple = 1
        if weight is not None and weight.device.type in BATCH and (timed or group.size >= WIDTH):
            multiple = preferred_multiple(weight.device, weight.dtype)
        found.append(multiple if multiple < group.size else 1)
    return tuple(found)


def _convolution(
    group: Group, structure: Structure, tensors: Mapping[str, Tensor], written: bool
) -> Tensor | None:
    """The weight of one that reads the group, or writes it, if that counts too."""
    parts = (part.tensor for part in (group.slices if written else group.readers))
    return next((tensors[name] for name in parts if len(structure.tensors[name]) > 2), None)


def block(times: Mapping[int, float], width: int = WIDTH) -> int:
    """The largest multiple that `times` (width -> seconds) shows to be a block ending at `width`."""
    for m in MULTIPLES:
        below, rise = times[width - m], times[width] - times[width - m]
        inside = [t - below for n, t in times.items() if width - m < n < width]
        if rise >= RISE * times[width] and min(inside) >= EARLY * rise:
            return m
    return 1


def preferred_multiple(device: torch.device, dtype: torch.dtype, cache: Path | None = None) -> int:
    """The measured multiple of `device` at `dtype`; measured once (well under a second), then read."""
    key = device_name(device, dtype)
    known = read_cache("rounding", cache).get(key)
    if known not in (1, *MULTIPLES):
        known = block(_measure(device, dtype))
        write_cache("rounding", key, known, cache)
    return int(known)


def _measure(device: torch.device, dtype: torch.dtype) -> dict[int, float]:
    widths = sorted({WIDTH, *(WIDTH - m for m in MULTIPLES), *(WIDTH - m + 1 for m in MULTIPLES), WIDTH - 1})
    runs = {n: _run(n, device, dtype) for n in widths}
    best = dict.fromkeys(widths, float("inf"))
    with torch.enable_grad():
        for _ in range(8):  # in turn, so that a busy moment hits all
            for n, run in runs.items():
                best[n] = min(best[n], _seconds(run, device))
    return best


def _run(n: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    x = torch.ones(BATCH[device.type], n, 16, 16, device=device, dtype=dtype, requires_grad=True)
    w = torch.ones(n, n, 3, 3, device=device, dtype=dtype, requires_grad=True)
    return lambda: torch.autograd.grad(F.conv2d(x, w, padding=1).sum(), (x, w))


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        began = time.process_time()
        run()
        return time.process_time() - began
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - began


def ladder(size: int, floor: int, step: int) -> NDArray[np.int64]:
    """Allowed widths of a group, ascending: the floor, multiples of the step above it, and dense."""
    multiples = np.arange(-(-floor // step) * step, size, step, dtype=np.int64)
    return ascending(np.concatenate([[floor], multiples, [size]]).astype(np.int64))


def ascending(values: NDArray[Any]) -> NDArray[Any]:
    """Sorted, each once: numpy's own `unique` imports its masked arrays first, 30 ms amid a run."""
    values = np.sort(values)
    first = np.ones(len(values), dtype=bool)
    first[1:] = values[1:] > values[:-1]
    return values[first]


@dataclass(frozen=True)
class Steps:
    """The widths that every group may have: its floor, multiples of its step, dense."""

    steps: tuple[int, ...]
    grains: tuple[int, ...]  # what finer steps, where they are taken, are multiples of
    floors: tuple[int, ...]

    @staticmethod
    def of(
        structure: Structure, round_to: int | None, multiples: Sequence[int] = (), *, timed: bool = False
    ) -> Steps:
        """`timed`: what the clock says is under budget."""
        sizes, own = structure.sizes, tuple(group.multiple for group in structure.groups)
        fine, steps = (
            tuple(math.lcm(step, grain) for step, grain in zip(found, own, strict=True))
            for found in (width_steps(sizes, round_to), width_steps(sizes, round_to, multiples))
        )
        whole = timed and len(multiples) > 0
        grains = tuple(
            step if round_to is not None or (whole and multiples[g] > 1) else own[g]
            for g, step in enumerate(steps)
        )
        floors = tuple(min(step, size) for step, size in zip(fine, sizes, strict=True))
        return Steps(steps, grains, floors)._as_said(structure)

    def _as_said(self, structure: Structure) -> Steps:
        """Where a group says its own."""
        rows = zip(structure.groups, self.steps, self.grains, self.floors, strict=True)
        said = [
            (g.step, g.step if g.least else g.multiple, 0 if g.optional else g.least or g.step)
            if g.step
            else (step, grain, max(floor, g.least))
            for g, step, grain, floor in rows
        ]
        return Steps(*(tuple(column) for column in zip(*said, strict=True))) if said else self

    def ends(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Floors that are whole grains."""
        whole = map(max, self.floors, map(min, self.grains, sizes))
        return tuple(end if floor else 0 for floor, end in zip(self.floors, whole, strict=True))

    def rungs(self, sizes: Sequence[int]) -> list[tuple[int, ...]]:
        """The widths from there on, per group."""
        return [
            tuple(int(n) for n in ladder(size, floor, step))
            for size, floor, step in zip(sizes, self.ends(sizes), self.steps, strict=True)
        ]


def width_steps(
    sizes: tuple[int, ...], round_to: int | None, multiples: Sequence[int] = ()
) -> tuple[int, ...]:
    """Width step per group: `round_to`, or the power of two under N/16, at most 16.

    `multiples`: what the device runs well, per group; a power of two under it gives way (cost/grid.py).
    """
    if round_to is not None:
        if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
            raise ValueError(f"round_to={round_to!r}: give a whole number of units >= 1, or None")
        return tuple(min(round_to, n) for n in sizes)
    powers = tuple(int(2 ** np.clip(np.floor(np.log2(max(1, n / 16))), 0, 4)) for n in sizes)
    return tuple(max(p, m) for p, m in zip(powers, multiples, strict=True)) if multiples else powers
