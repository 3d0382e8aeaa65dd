"""What the user asks for: limits on resources (`Budget`), or what they cost in loss (`Price`).

A limit is a fraction of the dense model or an absolute amount::

    0.5, 1, "60%"      r = fraction × dense,   fraction in (0, 1]
    "1.2 GFLOP"        r = min(amount in the resource's unit, dense)

Units (SI prefixes k M G T P; a multiply-add is 2 FLOP, so 1 MAC = 2 FLOP)::

    flops, train_flops    FLOP, MAC                  one forward pass on the example inputs; sum of the run
    params                elements ("1.2 M")
    memory                B, kB MB GB, KiB MiB GiB   peak of one training step
    latency, train_time   ns us µs ms s min h d      one forward pass; the whole run
    energy, train_energy  uJ µJ mJ J kJ MJ Wh kWh    one forward pass; the whole run

A `Price` is in loss per dense use of the resource: at `Price(flops=0.1)` a tenth of the dense FLOPs is
worth a rise of the loss of 0.01. Everything is checked when the object is made.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from numbers import Real
from typing import Any

__all__ = [
    "GAUGED",
    "MEASURED",
    "TOTALS",
    "UNITS",
    "Budget",
    "InfeasibleBudget",
    "Price",
    "Resource",
    "Target",
    "parse",
    "require_budget",
]

TOTALS = frozenset({"train_flops", "train_time", "train_energy"})  # sums over the run
MEASURED = frozenset({"latency", "energy", "train_time", "train_energy"})  # known only by measuring
GAUGED = MEASURED - TOTALS  # of one forward pass, which the gauge times
UNITS = {
    "flops": "FLOP",
    "params": "parameters",
    "memory": "B",
    "latency": "s",
    "energy": "J",
    "train_flops": "FLOP",
    "train_time": "s",
    "train_energy": "J",
}

_SI = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_FLOPS = {
    p + u: s * k for p, s in _SI.items() for u, k in (("FLOP", 1), ("FLOPs", 1), ("MAC", 2), ("MACs", 2))
}
_PARAMS = {p + u: s for p, s in (_SI | {"B": 1e9}).items() for u in ("", "params", " params")}
_BYTES = (
    {"B": 1.0} | {p + "B": s for p, s in _SI.items() if p} | {"KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
)
_TIME = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_ENERGY = {"uJ": 1e-6, "µJ": 1e-6, "mJ": 1e-3, "J": 1.0, "kJ": 1e3, "MJ": 1e6, "Wh": 3600.0, "kWh": 3.6e6}

_UNITS: Mapping[str, Mapping[str, float]] = {
    "flops": _FLOPS,
    "params": _PARAMS,
    "memory": _BYTES,
    "latency": _TIME,
    "energy": _ENERGY,
    "train_flops": _FLOPS,
    "train_time": _TIME,
    "train_energy": _ENERGY,
}
_EXAMPLES = {
    "flops": "1.2 GFLOP",
    "params": "1.2 M",
    "memory": "64 MiB",
    "latency": "3 ms",
    "energy": "0.8 J",
    "train_flops": "3 PFLOP",
    "train_time": "2 h",
    "train_energy": "0.5 kWh",
}
_NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(.*?)\s*")


class InfeasibleBudget(ValueError):
    """No choice of units meets the budget; `ranges`: (least, dense) of every resource."""

    def __init__(self, message: str, ranges: Mapping[str, tuple[float, float]]) -> None:
        super().__init__(message)
        self.ranges = dict(ranges)


@dataclass(frozen=True)
class Target:
    """A parsed limit: a fraction of dense, or an amount in FLOP, elements, bytes, seconds or joules."""

    value: float
    relative: bool

    def limit(self, dense: float) -> float:
        """Absolute; an amount above dense asks for nothing."""
        return self.value * dense if self.relative else min(self.value, dense)


def parse(resource: str, value: object) -> Target:
    """`value` as the user gave it for `resource`; ValueError or TypeError with what to write instead."""
    return _parse(resource, value, _UNITS[resource], _EXAMPLES[resource])


def _amounts(unit: str) -> dict[str, float]:
    """A unit of the user's own with SI prefixes."""
    return {prefix + unit: scale for prefix, scale in _SI.items()}


def _parse(resource: str, value: object, units: Mapping[str, float], amount_like: str) -> Target:
    example = f'a fraction in (0, 1], "60%" or an amount such as "{amount_like}"'
    if isinstance(value, Real) and not isinstance(value, bool):
        number = float(value)
        if 0 < number <= 1:
            return Target(number, True)
        above = math.isfinite(number) and number > 1
        hint = f'; for an absolute amount write it with its unit, "{amount_like}"' if above else ""
        raise ValueError(
            f"Budget({resource}={value!r}): not a fraction of dense in (0, 1]{hint or f'; give {example}'}"
        )
    if not isinstance(value, str):
        raise TypeError(f"Budget({resource}={value!r}): give {example}")
    match = _NUMBER.fullmatch(value)
    if match is None:
        raise ValueError(f"Budget({resource}={value!r}): does not start with a number; give {example}")
    number, unit = float(match[1]), match[2]
    if unit == "%":
        if not 0 < number <= 100:
            raise ValueError(f"Budget({resource}={value!r}): a share of dense lies in (0%, 100%]")
        return Target(number / 100, True)
    if unit not in units:
        known = ", ".join(u for u in units if u and not u.startswith((" ", "K")))
        raise ValueError(
            f"Budget({resource}={value!r}): unknown unit {unit!r}; give {example} (units: {known})"
        )
    amount = number * units[unit]
    if not (math.isfinite(amount) and amount > 0) or (resource == "params" and amount < 1):
        raise ValueError(f"Budget({resource}={value!r}): not a positive amount; give {example}")
    return Target(amount, False)


@dataclass(frozen=True)
class Resource:
    """A resource of the user's own, for `Budget(own={resource: limit})`: `name`, and the `unit` of its
    amounts.

    `cost`: from what the traced model uses (cost/uses.py: `flops`, `params`, `elements(name)`, polynomials in
    the widths, to be added and scaled) to the use, in `unit`. `measure`: what a copy of the live net really
    uses, in `unit`, where the cost is only a model of it; None: the cost is exact.
    """

    name: str
    unit: str
    cost: Callable[[Any], Any]
    measure: Callable[[Any], float] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier() or self.name in UNITS:
            raise ValueError(
                f"Resource(name={self.name!r}): give a name like a variable's, none of {', '.join(UNITS)}"
            )
        for argument, value in (("cost", self.cost), ("measure", self.measure or self.cost)):
            if not callable(value):
                raise TypeError(f"Resource({argument}={value!r}): give a function")


@dataclass(frozen=True)
class Budget:
    """Limits that are all met together: fractions of dense in (0, 1], "60%", or amounts with their unit.

    `flops`: of one forward pass on the example inputs ("1.2 GFLOP"; 1 MAC = 2 FLOP). `params`: elements
    ("1.2 M"). `memory`: peak of one training step ("64 MiB"). `latency`, `energy`: of one forward pass,
    measured ("3 ms", "0.8 J"). `train_flops`, `train_time`, `train_energy`: sums over the whole run ("3
    PFLOP", "2 h", "0.5 kWh"). `own`: limits on resources of your own, {Resource: limit}.
    """

    flops: float | str | None = None
    params: float | str | None = None
    memory: float | str | None = None
    latency: float | str | None = None
    energy: float | str | None = None
    train_flops: float | str | None = None
    train_time: float | str | None = None
    train_energy: float | str | None = None
    own: Mapping[Resource, float | str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.own, Mapping) or not all(isinstance(r, Resource) for r in self.own):
            raise TypeError(
                f"Budget(own={self.own!r}): give a mapping from controlprune.Resource to its limit"
            )
        if not self._targets:
            raise ValueError("Budget(): empty; name at least one resource, e.g. Budget(flops=0.5)")

    @cached_property
    def _targets(self) -> dict[str, Target]:
        given = {name: getattr(self, name) for name in UNITS}
        found = {name: parse(name, value) for name, value in given.items() if value is not None}
        return found | {
            r.name: _parse(r.name, v, _amounts(r.unit), f"3 {r.unit}") for r, v in self.own.items()
        }

    def targets(self) -> dict[str, Target]:
        """Resource -> parsed limit, of those that were given."""
        return dict(self._targets)

    def prices(self) -> dict[str, float]:
        """None are given."""
        return {}

    def limits(self, dense: Mapping[str, float]) -> dict[str, float]:
        """Absolute limit per resource, from what the dense model uses (same units as the module's table)."""
        return {name: target.limit(dense[name]) for name, target in self.targets().items()}


@dataclass(frozen=True)
class Price:
    """What a dense use of each resource is worth in loss, in place of a limit: finite and > 0.

    At `flops=0.1` a tenth of the dense FLOPs is worth a rise of the loss of 0.01; likewise `params`,
    `memory`, `latency` and `energy`, each of what `Budget` says.
    """

    flops: float | None = None
    params: float | None = None
    memory: float | None = None
    latency: float | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        given = {name: value for name, value in given.items() if value is not None}
        if not given:
            raise ValueError("Price(): empty; name at least one resource, e.g. Price(flops=0.1)")
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(
                    f"Price({name}={value!r}): give a number > 0, in loss per dense use of {name}"
                )
            if not (math.isfinite(value) and value > 0):
                raise ValueError(
                    f"Price({name}={value!r}): give a finite number > 0, in loss per dense use of {name}"
                )

    @property
    def own(self) -> Mapping[Resource, float | str]:
        """None are given."""
        return {}

    def targets(self) -> dict[str, Target]:
        """No limit is given."""
        return {}

    def prices(self) -> dict[str, float]:
        """Resource -> price, of those that were given."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: float(value) for name, value in given.items() if value is not None}


def require_budget(budget: object) -> None:
    """TypeError if it is neither a Budget nor a Price."""
    if not isinstance(budget, Budget | Price):
        raise TypeError(
            f"budget={budget!r}: give controlprune.Budget(flops=0.5) or controlprune.Price(flops=…)"
        )
