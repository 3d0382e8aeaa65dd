"""Seconds of one forward pass on this device, batch and number type, as a polynomial in the widths.

A forward pass takes the time of its arithmetic, of the memory it writes, of the weights it reads, and of
getting started. With the traced operators in families f,

    T(n) = a_0 + Σ_f a_f FLOPs_f(n) + Σ_f b_f bytes_f(n) + c weights(n) + d Σ_w bytes_w(n)²,   all >= 0

(the squares, one per write, because what no longer fits a cache costs more per byte) and since every part
is a polynomial in the widths, so is T. The coefficients come from measurements of the model itself at a
handful of widths n_k (dense, uniformly smaller, random; first units of each group), by nonnegative least
squares on relative errors:

    minimise Σ_k ( T(n_k) / t_k − 1 )²

`error` is what that fit gets wrong at widths it has not seen: the root mean square of T(n_k) / t_k − 1, each
k left out in turn. Kernels that work on blocks of units make steps that no polynomial has: give `steps` in
multiples the device runs well (`rounding.preferred_multiple`). A masked net still runs dense; only a shrunk
one shows its latency, so what is left of the error is for the loop to correct by measuring
(`timing.measure_latency`) after each shrink.

The model is not copied and comes back untouched. What was fitted is kept in a cache file per machine.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import nn

from ..cache import device_name, read_cache, write_cache
from ..structure.exchange import at_widths, first_units, tensors_of
from ..structure.extents import Extent
from ..structure.groups import Structure
from ..structure.trace import ExampleInputs, call_model, copied, input_tensors, untouched
from .polynomial import Polynomial
from .timing import Candidate, Clock, Run, Timing, device_clock, measure

__all__ = ["Latency", "families", "fit", "latency", "measure_widths", "trial_widths"]

Array: TypeAlias = NDArray[np.float64]
Term: TypeAlias = tuple[float, tuple[Extent, ...]]
SHARES = (0.75, 0.5, 0.35, 0.2)
RANDOM = 12  # width vectors drawn besides
MATRIX = frozenset(["mm", "addmm", "bmm", "baddbmm", "addbmm", "linear"])


@dataclass(frozen=True)
class Latency:
    """`seconds` over the widths, and how far to trust it.

    `coefficients`: family -> seconds of it in a dense forward; `error`: see the module; `points`: the widths
    that were timed; `timings`: what they took (both empty where all of it came from the cache).
    """

    seconds: Polynomial
    coefficients: Mapping[str, float]
    error: float
    points: tuple[tuple[int, ...], ...] = ()
    timings: tuple[Timing, ...] = ()


def latency(
    structure: Structure,
    model: nn.Module,
    inputs: ExampleInputs,
    *,
    steps: Sequence[int] | None = None,
    clock: Clock = time.perf_counter,
    seconds: float = 10.0,
    seed: int = 0,
    cache: Path | None = None,
    anew: bool = False,
) -> Latency:
    """Measure and fit, or read what was fitted for this model on this machine before.

    `inputs`: what the model will be deployed on, run in eval mode without gradients. `steps`: width step per
    group, so that only widths are timed that will be used. `seconds`: about how long to measure for.
    `cache`: the folder of the cache file (default: the user's); `anew`: measure whatever the cache knows.
    """
    device, dtype = _where(model)
    parts = families(structure, model)
    key = _signature(structure, inputs, steps, f"{device_name(device, dtype)} {_name_of(clock)}")
    known = None if anew else _read(read_cache("latency", cache).get(key), parts)
    if known is not None:
        return Latency(_polynomial(structure, parts, known[0]), *known)
    points = trial_widths(structure.sizes, steps, seed)
    timings = measure_widths(
        structure, model, inputs, points, clock=device_clock(device, clock), seconds=seconds
    )
    found = fit(structure, parts, points, [timing.median for timing in timings])
    write_cache("latency", key, {"coefficients": dict(found.coefficients), "error": found.error}, cache)
    return Latency(found.seconds, found.coefficients, found.error, tuple(points), tuple(timings))


def families(structure: Structure, model: nn.Module) -> dict[str, list[Term]]:
    """Family -> its terms: few whatever the model, fewer than there are trial widths."""
    found: dict[str, list[Term]] = {"start": [(1.0, ())]}
    for work in structure.work:
        name = "matrix" if work.operator in MATRIX else work.operator
        found.setdefault(f"{name} FLOPs", []).append((float(work.coefficient), work.factors))
    counted = {(work.where, work.operator) for work in structure.work}
    for write in structure.traffic:
        operator = write.operator.rpartition("::")[2].removesuffix("_")
        name = "product" if (write.where, operator) in counted else "other"
        found.setdefault(f"{name} bytes", []).append((float(write.coefficient), write.factors))
    if structure.traffic:
        found["large writes"] = [(float(w.coefficient), (*w.factors, *w.factors)) for w in structure.traffic]
    tensors = tensors_of(model)
    found["weights"] = [
        (float(tensors[n].element_size()), structure.tensors[n]) for n in sorted(structure.parameters)
    ]
    count, sizes = len(structure.groups), structure.sizes
    return {name: terms for name, terms in found.items() if Polynomial.of(terms, count).value(sizes) > 0}


def trial_widths(
    sizes: Sequence[int], steps: Sequence[int] | None = None, seed: int = 0
) -> list[tuple[int, ...]]:
    """Dense, uniform shares and random widths, on the ladder of `steps`; each once."""
    ladder = np.ones(len(sizes), int) if steps is None else np.asarray(steps, int)
    dense = np.asarray(sizes, int)
    random = np.random.default_rng(seed)
    shares = [np.full(len(sizes), share) for share in SHARES]
    shares += [random.uniform(0.15, 1.0, len(sizes)) for _ in range(RANDOM)]
    rounded = (np.maximum(np.round(share * dense / ladder), 1) * ladder for share in shares)
    found = (tuple(int(n) for n in np.minimum(widths, dense)) for widths in rounded)
    return list(dict.fromkeys([tuple(sizes), *found]))


def measure_widths(
    structure: Structure,
    model: nn.Module,
    inputs: ExampleInputs,
    points: Sequence[Sequence[int]],
    *,
    clock: Clock = time.perf_counter,
    seconds: float = 10.0,
) -> list[Timing]:
    """Time the model's forward, really shrunk, at each width vector, in turn; it comes back untouched."""
    inputs = copied(inputs)

    def at(widths: Sequence[int]) -> Candidate:
        values = first_units(model, structure, widths)

        @contextmanager
        def candidate() -> Iterator[Run]:
            with at_widths(model, structure, values, widths):
                yield lambda: call_model(model, inputs)

        return candidate

    with untouched(model), torch.no_grad():
        model.eval()
        return measure([at(widths) for widths in points], clock=clock, seconds=seconds)


def fit(
    structure: Structure,
    parts: Mapping[str, list[Term]],
    points: Sequence[Sequence[int]],
    times: Sequence[float],
) -> Latency:
    """Nonnegative coefficients of the families from times at widths; the first point is the dense one."""
    measured = np.asarray(times, float)
    if not (len(measured) and np.isfinite(measured).all() and (measured > 0).all()):
        raise ValueError(f"times={list(times)}: give a finite time > 0 of every width vector")
    count = len(structure.groups)
    columns = np.stack([Polynomial.of(terms, count).values(points) for terms in parts.values()], 1)
    shares = columns / columns[0] / measured[:, None]
    coefficients = _solve(shares)
    left_out = [
        shares[k] @ _solve(np.delete(shares, k, 0)) - 1.0 for k in range(len(measured)) if len(measured) > 1
    ]
    by_name = dict(zip(parts, map(float, coefficients), strict=True))
    error = float(np.sqrt(np.mean(np.square(left_out)))) if left_out else float("inf")
    return Latency(_polynomial(structure, parts, by_name), by_name, error)


def _solve(shares: Array) -> Array:
    return nnls(shares, np.ones(len(shares)))[0]


def _polynomial(
    structure: Structure, parts: Mapping[str, list[Term]], coefficients: Mapping[str, float]
) -> Polynomial:
    count = len(structure.groups)
    terms: list[Term] = []
    for name, part in parts.items():
        if coefficients[name] > 0:
            dense = Polynomial.of(part, count).value(structure.sizes)
            terms += [(coefficients[name] / dense * a, factors) for a, factors in part]
    return Polynomial.of(terms, count)


def _where(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    first = next(model.parameters())
    if first.device.type == "meta":
        raise ValueError("model: it lies on the meta device, where nothing runs; move it to the real one")
    return first.device, first.dtype


def _name_of(clock: Clock) -> str:
    """Of a function, or of the class of an object that can be called."""
    return getattr(clock, "__qualname__", type(clock).__qualname__)


def _signature(structure: Structure, inputs: ExampleInputs, steps: Sequence[int] | None, machine: str) -> str:
    shapes = [(tuple(tensor.shape), str(tensor.dtype)) for tensor in input_tensors(inputs)]
    told = (structure.sizes, structure.work, structure.traffic, tuple(structure.tensors.items()), shapes)
    digest = hashlib.sha256(repr((told, steps and tuple(steps))).encode()).hexdigest()[:16]
    return f"{machine} {digest}"


def _read(value: object, parts: Mapping[str, object]) -> tuple[dict[str, float], float] | None:
    """A cached fit, if that is what it is."""
    try:
        coefficients = {name: float(value["coefficients"][name]) for name in parts}  # type: ignore[index]
        error = float(value["error"])  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        return None
    sound = np.isfinite([error, *coefficients.values()]).all() and min(coefficients.values()) >= 0
    return (coefficients, error) if sound and any(coefficients.values()) else None
