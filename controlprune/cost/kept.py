"""What keeps a net from being narrower: the widths that are left alone, by their share of the narrowest net.

    share(r) = Σ {C_o(floors) : o contracts with a tensor that r stands in} / Σ_o C_o(floors)

Of FLOPs, o are the operators; of parameters, the parameters themselves. What is left alone for the same
reason is one; shares overlap where an operator has two such widths.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..structure.groups import Refusal, Structure
from ..structure.saying import printable
from .polynomial import Polynomial

__all__ = ["kept"]

TOLD = 3
LITTLE = 0.05  # a share that is not worth a line


def kept(structure: Structure, floors: Sequence[int], *, params: bool = False) -> str:
    """Those with the largest share of the FLOPs (or of `params`), a line each; empty where none has much."""
    by_reason: dict[str, list[Refusal]] = {}
    for refusal in structure.refused:
        by_reason.setdefault(refusal.reason, []).append(refusal)
    uses = _uses(structure, floors, params)
    shares = {reason: _share(alike, uses) for reason, alike in by_reason.items()}
    first = [
        reason for reason in sorted(shares, key=lambda reason: -shares[reason]) if shares[reason] >= LITTLE
    ]
    if not first:
        return ""
    lines = [f"  {shares[reason]:4.0%}  {_names(by_reason[reason])}: {reason}" for reason in first[:TOLD]]
    use = "parameters" if params else "FLOPs"
    return printable("\n".join([f"\nLeft alone, by share of the {use} of the narrowest net:", *lines]))


def _uses(structure: Structure, floors: Sequence[int], params: bool) -> list[tuple[float, Sequence[str]]]:
    """What each operator uses at the floors, and the parameters that it contracts with."""
    if params:
        terms = [(1.0, structure.tensors[name], (name,)) for name in sorted(structure.parameters)]
    else:
        terms = [(float(work.coefficient), work.factors, work.weights) for work in structure.work]
    groups = len(structure.groups)
    return [(Polynomial.of([(n, factors)], groups).value(floors), names) for n, factors, names in terms]


def _share(refusals: Sequence[Refusal], uses: Sequence[tuple[float, Sequence[str]]]) -> float:
    tensors = {name for refusal in refusals for name in refusal.tensors}
    part = sum(use for use, names in uses if not tensors.isdisjoint(names))
    return part / (sum(use for use, _ in uses) or 1.0)


def _names(refusals: Sequence[Refusal]) -> str:
    more = f" and {len(refusals) - 1} more" if len(refusals) > 1 else ""
    return f"{refusals[0].name} ({refusals[0].size}){more}"
