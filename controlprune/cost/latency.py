"""Seconds of one forward pass on this device, batch and number type, as a polynomial in the widths.

A forward pass takes the time of its arithmetic, of the memory it writes, of the weights it reads, and of
getting started. With the traced operators w in families f,

    T(n) = a_0 + Σ_w a_w FLOPs_w(n) + Σ_f b_f bytes_f(n) + c weights(n) + d Σ_v bytes_v(n)² + e calls(n),

all >= 0 (the squares, one per write v, because what no longer fits a cache costs more per byte; calls: the
operators of whole branches that are on, each of which has to get started) and since every part is a
polynomial in the widths, so is T. The coefficients come from measurements of the model itself at a handful
of widths n_k (dense, uniformly smaller, random; first units of each group; branches of width 0 are not run),
by nonnegative least squares on relative errors, the rates a_w of a family drawn to their mean ā_f, weighed by
the work:

    minimise Σ_k ( T(n_k) / t_k − 1 )²  +  μ Σ_w ( (a_w − ā_f) FLOPs_w(N) / T(N) )²

with the μ of `DRAWN` that predicts best the widths left out. A first convolution of three channels has
another rate than the rest; where there are few measurements and many operators, they have one.

`error` is what that fit gets wrong at widths it has not seen: the root mean square of T(n_k) / t_k − 1, each
k left out in turn. Kernels that work on blocks of units make steps that no polynomial has: give `steps` in
multiples the device runs well (cost/grid.py). A masked net still runs dense; only a shrunk one shows its
latency, so what is left of the error is for the loop to correct by measuring after each shrink
(cost/forward_time.py).

The model is not copied and comes back untouched. What was fitted is kept in a cache file per machine.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..control.nnls import nnls
from ..structure.exchange import at_widths, first_units, tensors_of
from ..structure.extents import Extent, Units
from ..structure.groups import Structure
from ..structure.record import ExampleInputs, copied, input_tensors
from ..structure.untouched import untouched
from .cache import device_name, read_cache, write_cache
from .clock import Candidate, Clock, Run, Timing, device_clock, measure
from .polynomial import Polynomial
from .replay import forward_on

__all__ = ["Latency", "Part", "fit", "latency", "measure_widths", "parts_of", "trial_widths"]

Array: TypeAlias = NDArray[np.float64]
Term: TypeAlias = tuple[float, tuple[Extent, ...]]
SHARES = (0.75, 0.5, 0.35, 0.2)
RANDOM = 12  # width vectors drawn besides
LEAST = 0.1  # share of a group in them
DRAWN = (1e-3, 1e-2, 0.1, 1.0, 1e4)  # μ, the last: one rate for all of a family
MATRIX = frozenset(["mm", "addmm", "bmm", "baddbmm", "addbmm", "linear"])


@dataclass(frozen=True)
class Part:
    """What has one coefficient. Parts of a family are believed to have much the same."""

    name: str
    family: str
    terms: list[Term]


@dataclass(frozen=True)
class Latency:
    """`seconds` over the widths, and how far to trust it.

    `coefficients`: part -> seconds of it in a dense forward; `error`: see the module; `least`: seconds at
    the floors (nan: not timed); `points`: the widths that were fitted; `timings`: what they took (both empty
    where all of it came from the cache).
    """

    seconds: Polynomial
    coefficients: Mapping[str, float]
    error: float
    least: float = math.nan
    points: tuple[tuple[int, ...], ...] = ()
    timings: tuple[Timing, ...] = ()


def latency(
    structure: Structure,
    model: nn.Module,
    inputs: ExampleInputs,
    *,
    rungs: Sequence[Sequence[int]] | None = None,
    floors: Sequence[int] | None = None,
    clock: Clock = time.perf_counter,
    cuda_graph: bool = False,
    seconds: float = 10.0,
    seed: int = 0,
    cache: Path | None = None,
    anew: bool = False,
) -> Latency:
    """Measure and fit, or read what was fitted for this model on this machine before.

    `inputs`: what the model will be deployed on, run in eval mode without gradients. `cuda_graph`: as the
    replay of a graph. `rungs`: the widths
    of each group that will be used (None: any), so that only those are timed. `floors`: the narrowest net,
    timed beside; below the blocks of a kernel no polynomial tells it. `seconds`: about how long to measure.
    `cache`: the folder of the cache file (default: the user's); `anew`: measure whatever the cache knows.
    """
    device, dtype = _where(model)
    parts = parts_of(structure, model)
    machine = f"{device_name(device, dtype)} {_name_of(clock)}{' replayed' if cuda_graph else ''}"
    key = _signature(structure, inputs, (rungs, floors), machine)
    known = None if anew else _read(read_cache("latency", cache).get(key), parts, floors is not None)
    if known is not None:
        return Latency(_polynomial(structure, parts, known[0]), *known)
    points = trial_widths(structure.sizes, rungs, seed)
    beside = [] if floors is None else [tuple(floors)]
    timings = measure_widths(
        structure,
        model,
        inputs,
        [*points, *beside],
        clock=device_clock(device, clock),
        cuda_graph=cuda_graph,
        seconds=seconds,
    )
    fitted, apart = timings[: len(points)], timings[len(points) :]
    found = fit(structure, parts, points, [timing.median for timing in fitted])
    least = apart[0].median if apart else math.nan
    told = {"coefficients": dict(found.coefficients), "error": found.error, "least": least}
    write_cache("latency", key, told, cache)
    return replace(found, least=least, points=tuple(points), timings=tuple(fitted))


def parts_of(structure: Structure, model: nn.Module) -> list[Part]:
    """Counted operators one by one; bytes and the rest in few families, whatever the model."""
    count, sizes = len(structure.groups), structure.sizes
    found = []
    for k, work in enumerate(structure.work):
        family = f"{'matrix' if work.operator in MATRIX else work.operator} FLOPs"
        terms = [(float(work.coefficient), work.factors)]
        found.append(Part(f"{family} {k} {work.where}", family, terms))
    others: dict[str, list[Term]] = {"start": [(1.0, ())]}
    counted = {(work.where, work.operator) for work in structure.work}
    for write in structure.traffic:
        operator = write.operator.rpartition("::")[2].removesuffix("_")
        name = "product" if (write.where, operator) in counted else "other"
        others.setdefault(f"{name} bytes", []).append((float(write.coefficient), write.factors))
    whole = {branch.group for branch in structure.branches}
    calls = [
        tuple(f for f in w.factors if isinstance(f, Units) and f.group in whole) for w in structure.traffic
    ]
    others["calls"] = [(1.0, branches) for branches in calls if branches]
    if structure.traffic:
        others["large writes"] = [(float(w.coefficient), (*w.factors, *w.factors)) for w in structure.traffic]
    tensors = tensors_of(model)
    others["weights"] = [
        (float(tensors[n].element_size()), structure.tensors[n]) for n in sorted(structure.parameters)
    ]
    found += [Part(name, name, terms) for name, terms in others.items()]
    return [part for part in found if Polynomial.of(part.terms, count).value(sizes) > 0]


def trial_widths(
    sizes: Sequence[int], rungs: Sequence[Sequence[int]] | None = None, seed: int = 0
) -> list[tuple[int, ...]]:
    """Dense, uniform shares, nothing of what may be off as a whole, and random widths, each the nearest rung;
    no vector twice."""
    ladders = [range(1, n + 1) for n in sizes] if rungs is None else rungs
    random = np.random.default_rng(seed)
    branches = np.array([0 in ladder for ladder in ladders])
    shares = [np.where(branches, 1.0, share) for share in SHARES]
    shares += [np.where(branches, 0.0, 1.0)]
    shares += [random.uniform(LEAST, 1.0, len(sizes)) for _ in range(RANDOM)]
    wanted = (np.asarray(sizes) * share for share in shares)
    found = [tuple(map(_nearest, ladders, widths)) for widths in wanted]
    return list(dict.fromkeys([tuple(sizes), *found]))


def _nearest(rungs: Sequence[int], width: float) -> int:
    return min(rungs, key=lambda n: abs(n - width))


def measure_widths(
    structure: Structure,
    model: nn.Module,
    inputs: ExampleInputs,
    points: Sequence[Sequence[int]],
    *,
    clock: Clock = time.perf_counter,
    cuda_graph: bool = False,
    seconds: float = 10.0,
) -> list[Timing]:
    """Time the model's forward, really shrunk, at each width vector, in turn; it comes back untouched."""
    inputs, forward = copied(inputs), forward_on(_where(model)[0], cuda_graph=cuda_graph)

    def at(widths: Sequence[int]) -> Candidate:
        values, run = first_units(model, structure, widths), forward(model, inputs)

        @contextmanager
        def candidate() -> Iterator[Run]:
            with at_widths(model, structure, values, widths):
                yield run

        return candidate

    with untouched(model), torch.no_grad():
        model.eval()
        return measure([at(widths) for widths in points], clock=clock, seconds=seconds)


def fit(
    structure: Structure,
    parts: Sequence[Part],
    points: Sequence[Sequence[int]],
    times: Sequence[float],
) -> Latency:
    """Nonnegative coefficients of the parts from times at widths; the first point is the dense one."""
    measured = np.asarray(times, float)
    if not (len(measured) and np.isfinite(measured).all() and (measured > 0).all()):
        raise ValueError(f"times={list(times)}: give a finite time > 0 of every width vector")
    columns = np.stack([Polynomial.of(p.terms, len(structure.groups)).values(points) for p in parts], 1)
    shares = columns / columns[0] / measured[:, None]
    apart = _apart([part.family for part in parts], columns[0]) / measured[0]
    error, drawn = min((_left_out(shares, apart, drawn), drawn) for drawn in DRAWN)
    coefficients = _solve(shares, apart, drawn)
    by_name = {part.name: float(x) for part, x in zip(parts, coefficients, strict=True)}
    return Latency(_polynomial(structure, parts, by_name), by_name, error)


def _apart(families: Sequence[str], dense: Array) -> Array:
    """Rows that take from each part's seconds those it would have at the rate of its family."""
    kin = np.array([[a == b for b in families] for a in families], float)
    rows = np.eye(len(families)) - kin * dense[:, None] / (kin @ dense)[:, None]
    return rows[kin.sum(axis=1) > 1]


def _left_out(shares: Array, apart: Array, drawn: float) -> float:
    """Root mean square of the relative error at each point, fitted without it."""
    if len(shares) < 2:
        return math.inf
    rest = (np.delete(shares, k, 0) for k in range(len(shares)))
    errors = [row @ _solve(others, apart, drawn) - 1.0 for row, others in zip(shares, rest, strict=True)]
    return float(np.sqrt(np.mean(np.square(errors))))


def _solve(shares: Array, apart: Array, drawn: float) -> Array:
    wanted = np.concatenate([np.ones(len(shares)), np.zeros(len(apart))])
    return nnls(np.concatenate([shares, math.sqrt(drawn) * apart]), wanted)


def _polynomial(structure: Structure, parts: Sequence[Part], coefficients: Mapping[str, float]) -> Polynomial:
    count = len(structure.groups)
    terms: list[Term] = []
    for part in parts:
        if coefficients[part.name] > 0:
            dense = Polynomial.of(part.terms, count).value(structure.sizes)
            terms += [(coefficients[part.name] / dense * a, factors) for a, factors in part.terms]
    return Polynomial.of(terms, count)


def _where(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    first = next(model.parameters())
    if first.device.type == "meta":
        raise ValueError("model: it lies on the meta device, where nothing runs; move it to the real one")
    return first.device, first.dtype


def _name_of(clock: Clock) -> str:
    """Of a function, or of the class of an object that can be called."""
    return getattr(clock, "__qualname__", type(clock).__qualname__)


def _signature(
    structure: Structure, inputs: ExampleInputs, widths: tuple[object, object], machine: str
) -> str:
    shapes = [(tuple(tensor.shape), str(tensor.dtype)) for tensor in input_tensors(inputs)]
    told = (structure.sizes, structure.work, structure.traffic, tuple(structure.tensors.items()), shapes)
    digest = hashlib.sha256(repr((told, widths)).encode()).hexdigest()[:16]
    return f"{machine} {digest}"


def _read(value: Any, parts: Sequence[Part], least: bool) -> tuple[dict[str, float], float, float] | None:
    """A cached fit, if that is what it is; `least`: it must know the narrowest net."""
    try:
        coefficients = {p.name: float(value["coefficients"][p.name]) for p in parts}
        error, narrowest = float(value["error"]), float(value["least"]) if least else math.nan
    except (KeyError, TypeError, ValueError):
        return None
    known = [error, *coefficients.values(), *([narrowest] if least else [])]
    sound = np.isfinite(known).all() and min(known) >= 0
    return (coefficients, error, narrowest) if sound and any(coefficients.values()) else None
