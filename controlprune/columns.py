"""What the reader columns say of each unit: gate gradients and weight norms, dormant units included.

For a gate `g` multiplied onto the output of unit `i`, whatever the activation, in units of the loss,

    ∂L/∂g_i = Σ_{reader columns of i} ⟨w, ∂L/∂w⟩        (w parked where the unit is dormant)

since the columns are contracted with that output. A dormant unit's columns are zero in the masked layout,
but its rows still compute, so their gradient arrives: it is multiplied with the parked column, added to a
record and cleared. Between arrival and reading the user may rescale gradients (unscaling, clipping by
norm, zero_grad); the record follows by the ratio of ‖p.grad‖ now to ‖p.grad‖ after the last arrival.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .shrink import Spot, at, fill_zero_
from .structure.extents import keep, labels

__all__ = ["Reading", "Watch", "inner", "per_unit", "readings", "select_others"]


PerPosition: TypeAlias = Callable[[Spot, int], Tensor | None]


class Watch:
    """Gradients of the dormant columns of one parameter: read as they arrive, then cleared.

    `record[d][j] = Σ_{other dimensions} w ∂w` at silent position j of dimension d, for the gradients now
    in `parameter.grad` and at their scale once `settle` has run.
    """

    def __init__(self, spot: Spot, parameter: Tensor) -> None:
        assert spot.home is not None
        self.parameter, self.home = parameter, spot.home
        self.silent = at(spot.cuts, "silent")
        self.record = {d: _zeros(len(index), parameter) for d, index in self.silent.items()}
        self.norm = _zeros((), parameter)
        self.handles = [
            parameter.register_hook(lambda _: self.settle()),
            parameter.register_post_accumulate_grad_hook(self.arrive),
        ]

    def read(self, dim: int) -> Tensor:
        self.settle()
        return self.record[dim]

    @torch.no_grad()
    def settle(self) -> None:
        """Bring the record to the scale `parameter.grad` has now."""
        if self.parameter.grad is None:
            self.record = {d: torch.zeros_like(record) for d, record in self.record.items()}
            return
        now = _norm(self.parameter.grad)
        ratio = torch.where(self.norm > 0, now / self.norm, 1.0)
        self.record = {d: torch.where(now > 0, record * ratio, 0.0) for d, record in self.record.items()}
        self.norm = now

    @torch.no_grad()
    def arrive(self, parameter: Tensor) -> None:
        """Add what a backward pass has just brought for dormant columns, and clear it."""
        assert parameter.grad is not None
        for d, index in self.silent.items():
            others = {k: silent for k, silent in self.silent.items() if k != d}
            column = fill_zero_(self.home.index_select(d, index), others)
            self.record[d] = self.record[d] + inner(column, parameter.grad.index_select(d, index), d)
        fill_zero_(parameter.grad, self.silent)
        self.norm = _norm(parameter.grad)


@dataclass(frozen=True)
class Reading:
    """Which units of `group` the positions of one reader dimension belong to, at the present masks.

    `live_at`: positions of the tensor as it lies now; `parked_at`: positions among its silent ones.
    A position counts for a unit only where every other group that stands there is live.
    """

    group: int
    spot: Spot
    dim: int
    live_at: Tensor
    live_unit: Tensor
    parked_at: Tensor
    parked_unit: Tensor


def readings(spots: Iterable[Spot], masks: Sequence[Tensor], compact: bool) -> list[Reading]:
    return [
        _reading(spot, dim, group, masks, compact)
        for spot in spots
        for dim, groups in spot.reads.items()
        for group in sorted(groups)
    ]


def per_unit(
    reads: Sequence[Reading], sizes: Sequence[int], live: PerPosition, parked: PerPosition
) -> list[Tensor]:
    """Sum for each unit of each group what `live` and `parked` give per position: float32 of N_g."""
    found: dict[tuple[str, int], tuple[Tensor | None, Tensor | None]] = {}
    sums: dict[int, Tensor] = {}
    for r in reads:
        key = (r.spot.name, r.dim)
        if key not in found:
            found[key] = (
                live(r.spot, r.dim),
                parked(r.spot, r.dim) if r.dim in at(r.spot.cuts, "silent") else None,
            )
        wheres, units = (r.live_at, r.parked_at), (r.live_unit, r.parked_unit)
        for values, where, unit in zip(found[key], wheres, units, strict=True):
            if values is None or not len(where):
                continue
            if r.group not in sums:
                sums[r.group] = torch.zeros(sizes[r.group], device=values.device)
            total = sums[r.group]
            part = values[where.to(values.device)].to(total)
            total.index_add_(0, unit.to(total.device), part)
    return [sums[g] if g in sums else torch.zeros(n) for g, n in enumerate(sizes)]


def select_others(tensor: Tensor, spot: Spot, dim: int) -> Tensor:
    """The live positions of every dimension but `dim`."""
    for d, index in at(spot.cuts, "live").items():
        if d != dim:
            tensor = tensor.index_select(d, index)
    return tensor


def inner(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Σ over all dimensions but `dim` of Re(a* b), in at least float32."""
    product = (a.conj() * b).real if a.is_complex() else a.to(_wide(a)) * b
    others = [d for d in range(product.ndim) if d != dim]
    return product.sum(others) if others else product


def _reading(spot: Spot, dim: int, group: int, masks: Sequence[Tensor], compact: bool) -> Reading:
    extent = spot.extents[dim]
    live = keep(extent, masks)
    units = labels(extent, group)
    others = [torch.ones_like(mask) if g == group else mask for g, mask in enumerate(masks)]
    counted = (units >= 0) & keep(extent, others)
    here, gone = counted & live, counted & ~live
    cut = spot.cuts.get(dim)
    silent = units[:0] if cut is None else cut.silent.cpu()
    device = None if cut is None else cut.silent.device
    live_at = (here[live] if compact else here).nonzero().flatten()
    parked_at = gone[silent].nonzero().flatten()
    positions = (live_at, units[here], parked_at, units[silent[parked_at]])
    return Reading(group, spot, dim, *(position.to(device) for position in positions))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype in (torch.float64, torch.complex128) else torch.float32


def _zeros(shape: int | tuple[int, ...], like: Tensor) -> Tensor:
    return torch.zeros(shape, dtype=_wide(like), device=like.device)


def _norm(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return torch.linalg.vector_norm(real, dtype=_wide(tensor))
