"""Several plants on one model as one: each has its own units and its own parameters.

    masks, gate gradients, norms    one after the other, in the order of the plants
    apply                           all of them go to the new masks, or none

No parameter belongs to two (granularity/several.py), so that what one does the others do not see.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..structure.groups import Structure
from .base import BasePlant, Kind
from .gate_gradients import Later
from .layout import Spot
from .masks import Masks

__all__ = ["SeveralPlants"]


class SeveralPlants(BasePlant):
    """`parts`: the plants, whose groups one after the other are those of `structure`."""

    packs: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        structure: Structure,
        parts: Sequence[BasePlant],
        park_on: torch.device | None = None,
    ) -> None:
        self.model, self.optimizer, self.structure, self.park_on = model, optimizer, structure, park_on
        self.parts = tuple(parts)
        self.shrinks = any(part.shrinks for part in parts)  # type: ignore[misc]
        self.parks = any(part.parks for part in parts)  # type: ignore[misc]

    def _split(self, masks: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        left, found = list(masks), []
        for part in self.parts:
            count = len(part.structure.groups)
            found.append(tuple(left[:count]))
            left = left[count:]
        return found

    @property
    def masks(self) -> Masks:  # type: ignore[override]
        return tuple(mask for part in self.parts for mask in part.masks)

    @property
    def compact(self) -> bool:  # type: ignore[override]
        """Are those out of the tensors that could stand in them?"""
        return any(part.compact for part in self.parts if part.parks or not self.parks)

    def widths_at(self, masks: Sequence[Tensor], compact: bool) -> tuple[int, ...]:
        pairs = zip(self.parts, self._split(masks), strict=True)
        return tuple(n for part, own in pairs for n in part.widths_at(own, compact and part.shrinks))

    @property
    def spots(self) -> tuple[Spot, ...]:
        return tuple(spot for part in self.parts for spot in part.spots)

    @property
    def removed(self) -> Mapping[str, Tensor]:  # type: ignore[override]
        return {name: tensor for part in self.parts for name, tensor in part.removed.items()}

    @property
    def portable(self) -> tuple[Structure, Masks]:
        shrinking = [part for part in self.parts if part.shrinks]  # they come first
        if not shrinking:
            return self.parts[0].portable
        masks = tuple(mask for part in shrinking for mask in part.masks)
        return replace(self.structure, groups=self.structure.groups[: len(masks)], entries={}), masks

    def project(self, masks: Masks) -> Masks:
        pairs = zip(self.parts, self._split(masks), strict=True)
        return tuple(mask for part, own in pairs for mask in part.project(own))

    def expect(self, kind: Kind | None) -> None:
        for part in self.parts:
            part.expect(kind)

    def apply(self, masks: Sequence[Tensor], *, compact: bool) -> None:
        if len(masks) != len(self.structure.groups):
            raise ValueError(
                f"masks: got {len(masks)} for {len(self.structure.groups)} groups; give one for each"
            )
        with ExitStack() as undo:
            pairs = zip(self.parts, self._split(masks), strict=True)
            for part, own in sorted(pairs, key=lambda pair: not pair[0].parks):  # these cannot be undone
                undo.callback(part.apply, part.masks, compact=part.compact)
                part.apply(own, compact=compact and not all(bool(m.all()) for m in own))
            undo.pop_all()

    def quiet(self, state: Mapping[str, Any], prefix: str) -> bool:
        return all(part.quiet(state, prefix) for part in self.parts)

    def follow_tensors(self) -> None:
        for part in self.parts:
            part.follow_tensors()

    def recheck(self) -> None:
        for part in self.parts:
            part.recheck()

    def rest(self) -> None:
        for part in self.parts:
            part.rest()

    @property
    def rests(self) -> bool:
        return any(part.rests for part in self.parts)

    def read_later(self, later: Later) -> None:
        for part in self.parts:
            part.read_later(later)

    def release(self) -> None:
        for part in self.parts:
            part.release()

    def harden(self) -> None:
        for part in self.parts:
            part.harden()

    @property
    def has_gradients(self) -> bool:
        return any(part.has_gradients for part in self.parts)

    def gate_gradient(self, only: Collection[int] | None = None) -> Tensor:
        rows = [part.gate_gradient(only) for part in self.parts]
        return torch.cat([row.to(rows[0].device) for row in rows])

    def shares(self) -> Tensor | None:
        found = [(part.shares(), sum(part.structure.sizes)) for part in self.parts]
        if all(shares is None for shares, _ in found):
            return None
        return torch.cat([torch.ones(units) if shares is None else shares for shares, units in found])

    @property
    def error_bounds(self) -> Mapping[str, float]:
        return {name: bound for part in self.parts for name, bound in part.error_bounds.items()}

    @property
    def mark(self) -> Sequence[int]:
        return [word for part in self.parts for word in part.mark]

    @contextmanager
    def loading(self) -> Iterator[None]:
        with ExitStack() as all_of_them:
            for part in self.parts:
                all_of_them.enter_context(part.loading())
            yield

    def weight_norms(self) -> list[Tensor]:
        return [norms for part in self.parts for norms in part.weight_norms()]

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{n}:{k}": v for n, part in enumerate(self.parts) for k, v in part.state_dict().items()}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        mine = [
            {k.removeprefix(f"{n}:"): v for k, v in saved.items() if k.startswith(f"{n}:")}
            for n in range(len(self.parts))
        ]
        if sum(map(len, mine)) != len(saved):
            raise ValueError("saved: it was saved under another granularity")
        with ExitStack() as undo:
            for part, state in zip(self.parts, mine, strict=True):
                undo.callback(part.apply, part.masks, compact=part.compact)
                part.load_state_dict(state)
            undo.pop_all()
