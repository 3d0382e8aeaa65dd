"""What there is to know, as aligned plain text: groups, refusals, feasible budgets, results, a run's record.

A group's share of a resource is what goes with it: `C(N) − C(N with n_g = 0)` as a fraction of dense
`C(N)`. Neighbouring layers share work, so shares need not add up to one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..allocate.uniform import uniform
from ..budget import UNITS, InfeasibleBudget
from ..cost.flops import flops
from ..cost.grid import width_steps
from ..cost.params import parameters
from ..cost.polynomial import Polynomial
from ..cost.problem import feasible_range
from ..cost.survey import Survey
from ..loop.history import History
from ..structure.groups import Structure
from ..structure.saying import printable

__all__ = [
    "budgets_table",
    "groups_table",
    "quantity",
    "refusals_table",
    "results_table",
    "structure_report",
    "summary",
    "table",
]

PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"))


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: text to the left, numbers to the right, a rule under the headers."""
    cells = [[printable(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    right = [bool(rows) and all(_numeric(row[column]) for row in rows) for column in range(len(headers))]
    lines = [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("─" * width for width in widths), *lines[1:]])


def quantity(value: float, unit: str = "") -> str:
    """Three significant digits and a prefix: 1 234 567 FLOP -> "1.23 MFLOP"."""
    below = PREFIXES[-1] if value else (1.0, "")
    scale, prefix = next(((s, p) for s, p in PREFIXES if abs(value) >= 0.9995 * s), below)
    digits = f"{value / scale:.3g}"
    return f"{digits} {prefix}{unit}".rstrip()


def groups_table(structure: Structure) -> str:
    """Name, units, what goes with them, kind: one line per group."""
    costs = {"FLOPs": flops(structure), "parameters": parameters(structure)}
    rows = [
        [
            group.name,
            str(group.size),
            *(_share(cost, structure.sizes, g) for cost in costs.values()),
            group.kind,
        ]
        for g, group in enumerate(structure.groups)
    ]
    return table(["group", "units", *costs, "kind"], rows)


def refusals_table(structure: Structure) -> str:
    """What is left alone, and why."""
    return table(
        ["left alone", "units", "reason"], [[r.name, str(r.size), r.reason] for r in structure.refused]
    )


def structure_report(structure: Structure, measured: Survey | None = None) -> str:
    """Groups, refusals and the range each budget can be asked for; `measured`: costs besides the counted."""
    if not structure.groups:
        parts = ["Nothing in this model can be pruned."]
    else:
        parts = [groups_table(structure), _ranges_table(structure, measured or Survey({}))]
    if structure.refused:
        parts.insert(1, refusals_table(structure))
    return "\n\n".join(parts)


def budgets_table(structure: Structure, fractions: Sequence[float], measured: Survey | None = None) -> str:
    """What uniform nets within these shares of the FLOPs have left, and what is predicted of them."""
    sizes, steps = structure.sizes, width_steps(structure.sizes, None)
    costs = {"flops": flops(structure), "params": parameters(structure)}
    costs |= dict(measured.costs) if measured is not None else {}
    rows = []
    for fraction in fractions:
        try:
            limit = fraction * costs["flops"].value(sizes)
            widths = uniform(sizes, [costs["flops"]], [limit], steps, steps)
        except InfeasibleBudget as error:
            rows.append([_percent(fraction), f"cannot be met: {error}", *["–"] * len(costs)])
            continue
        left = [
            quantity(c.value(widths), "" if name == "params" else UNITS[name]) for name, c in costs.items()
        ]
        rows.append([_percent(fraction), f"{sum(widths)} of {sum(sizes)}", *left])
    return table(["budget", "units left, uniform", *costs], rows)


def summary(history: History) -> str:
    """A run in a few lines: where every resource ended, each layer's units, what it cost to control."""
    if len(history) == 0:
        return "empty history: no update was recorded"
    last = history[-1]
    on, off = (sum(sum(getattr(row, name)) for row in history) for name in ("on", "off"))
    shrinks = sum("shrink" in row.event.split(",") for row in history)
    resources = [
        [name, _percent(value), _percent(last.reference.get(name)), _percent(history.budget.get(name))]
        for name, value in last.realised.items()
    ]
    came_back = [sum(row.on[g] for row in history) for g in range(len(history.names))]
    groups = [
        [name, str(size), str(active), _percent(active / size), str(back)]
        for name, size, active, back in zip(history.names, history.sizes, last.active, came_back, strict=True)
    ]
    moved = f"{off} units switched off, {on} back on, {shrinks} shrinks"
    cost = (
        f"controller {last.overhead_seconds:.1f} s CPU; this process {last.seconds:.1f} s CPU since attach, "
        "other work included"
    )
    return "\n\n".join(
        [
            f"step {last.step} of {history.total_steps}, loss {last.loss:.4g}; {moved}; {cost}",
            table(["resource", "realised", "reference", "budget"], resources),
            table(["group", "dense", "active", "share", "came back"], groups),
        ]
    )


def results_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows with the same keys, keys as headers."""
    return table(list(rows[0]), [list(row.values()) for row in rows])


def _ranges_table(structure: Structure, measured: Survey) -> str:
    """From the floor that `attach` keeps in every group to dense."""
    costs = {"flops": flops(structure), "params": parameters(structure), **measured.costs}
    floors = width_steps(structure.sizes, None)
    rows = []
    for name, cost in costs.items():
        known = [measured.least.get(name, 0.0)]
        [(least, dense)] = feasible_range([cost], floors, structure.sizes, known)
        if dense > 0:
            unit = UNITS[name] if name != "params" else ""
            ends = (quantity(value, unit) for value in (least, dense))
            rows.append([name, _percent(least / dense), "100.0 %", *ends])
    return table(["budget", "from", "to", "least", "dense"], rows)


def _share(cost: Polynomial, sizes: Sequence[int], group: int) -> str:
    dense = cost.value(sizes)
    return _percent(cost.marginal(sizes, group, sizes[group]) / dense if dense else None)


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.1f} %"


def _numeric(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] in ("–", "−", "-", "+")
