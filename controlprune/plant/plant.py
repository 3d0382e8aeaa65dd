"""The masking layer: any set of units off or on, in one of two layouts, exactly.

Switching off unit `i` of a group means that nothing reads it: the columns `w` that are contracted with
its output are zero. Two layouts of the user's tensors give the same outputs and the same training steps:

    masked   dense shapes; reader columns of dormant units are 0, the unit's own rows keep computing
    compact  only the live entries exist: contiguous tensors, sizes in the modules updated, no hooks

and a tensor in which nothing is dormant is as its user made it. What is dormant is parked (see
`plant/layout.py`), and at rest between steps (`plant/rest.py`). The cost of a step in the compact layout is
that of a native model; in the masked one it is that of the dense model and of these copies.

Known limits: BatchNorm statistics of dormant channels keep moving in the masked layout (parked in the
compact one). Optimizers that normalise by a whole tensor (Adafactor, LAMB) see dormant zeros while
masked. Parameters frozen or unfrozen while masked are noticed at the next `apply`. A `copy.deepcopy` of
the model has the live tensors and no hooks, and computes the same. An EMA copy made before is cut by a plant
of its own, `Plant(averaged.module, None, structure)`, and goes on averaging.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..structure.caches import drop_caches
from ..structure.extents import Extent, groups_in
from ..structure.groups import Structure, widths_of
from ..structure.sizes import set_sizes
from ..structure.skipping import off, remove, skip
from ..structure.standins import count_live
from ..structure.surroundings import plainly
from .base import BasePlant, Kind
from .cuts import cuts_at
from .gate_gradients import Gather, Later, Pair, gather, inner, per_unit, select_others
from .hooks import Link
from .layout import Spot, Switch, at, cuts_of, follow, move, require_as_laid
from .masks import Masks, all_on, checked
from .optimizer import Factored, check_optimizer, factored, forget, require_nothing_beside, travelling
from .parked import escaped, pack, parsed, small_state_aside, unpack
from .parking import settle
from .rest import Rest

__all__ = ["Plant", "spots_of"]


class Plant(BasePlant):
    """The user's model and optimizer, with any of its units switched off, masked or compact.

    `masks` holds one CPU bool tensor of N_g per group of `structure`, True = active. Every method
    validates before it changes anything. `optimizer=None`: weights only. `park_on`: the device on which
    parked tensors wait while compact ("cpu" spares an accelerator's memory); None: beside the live ones.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        structure: Structure,
        *,
        park_on: torch.device | str | None = None,
    ) -> None:
        self.model, self.optimizer, self.structure = model, optimizer, structure
        self.park_on = None if park_on is None else torch.device(park_on)
        self.masks: Masks = all_on(structure)
        self.compact = False
        self._hardened = False
        self._summed: Factored = frozenset()
        self._spots = self._laid_on()
        self._rest: Rest | None = None
        self._expected = True  # are gradients of dormant units read?
        self._seen: dict[str, Tensor] = {}
        self._gather: Gather | None = None
        self._parked: dict[tuple[str, int], Tensor] = {}  # norms of what is parked
        self._later: Later | None = None
        self._sending: set[torch.device] = set()  # devices that may still copy to `park_on`
        self._check()

    def _laid_on(self) -> tuple[Spot, ...]:
        """The tensors that units stand in, as far as this process holds them (plant/sharded.py)."""
        return spots_of(self.structure)

    @property
    def _counted(self) -> tuple[Spot, ...]:
        """Those that this process counts in sums over units."""
        return self._spots

    @plainly
    def apply(self, masks: Sequence[Tensor], *, compact: bool) -> None:
        """Switch to `masks` in the masked or the compact layout, exactly, from any other.

        Gradients of units that leave are dropped; units that return have gradient zero.
        """
        if self._hardened:
            raise RuntimeError(
                "this model was made small for good (harden); attach it anew to prune it further"
            )
        masks = checked(masks, self.structure)
        tensors = self.tensors()
        self._follow(tensors)
        self._require_as_laid(tensors)
        if compact:
            require_nothing_beside(self.optimizer)
        self._summed |= factored(self.optimizer)
        states = {s.name: self._state(s, tensors[s.name]) for s in self._spots}  # raises before any change
        changed = {
            g
            for g, (old, new) in enumerate(zip(self.masks, masks, strict=True))
            if not torch.equal(old, new) or (compact != self.compact and not new.all())
        }
        switch = Switch(self.compact, compact, self.park_on)
        if not changed and switch.now == switch.then:
            return
        moving = [spot for spot in self._spots if spot.groups & changed]
        with ExitStack() as undo, torch.no_grad():
            undo.callback(self._set, self.masks, self.compact, tensors)
            branches = self.structure.branches
            undo.callback(skip, self.model, branches, self.masks if self.compact else None)
            skip(self.model, branches, None)
            self._unhook()
            known = cuts_at((key for s in moving for key in s.keys(tensors[s.name].device)), masks)
            for spot in moving:
                tensor = tensors[spot.name]
                cuts = cuts_of(spot, masks, tensor.device, known)
                move(spot, tensor, self.optimizer, states[spot.name], cuts, switch, undo)
                if switch.park_on is not None:
                    self._sending.add(tensor.device)
            if changed and (compact or self.compact):
                undo.callback(
                    set_sizes, self.model, self.structure, widths_of(self.masks) if self.compact else None
                )
                widths = widths_of(masks) if compact else self.structure.sizes
                set_sizes(self.model, self.structure, widths)
            if changed:
                heard = None if self.compact else self.masks  # what norms take their statistics over
                undo.callback(count_live, self.model, self.structure, heard)
                count_live(self.model, self.structure, None if compact else masks)
                drop_caches(self.model)
            skip(self.model, branches, masks if compact else None)
            self._set(masks, compact, tensors)
            undo.pop_all()
        torch.clear_autocast_cache()  # the weights it knows are no more

    def _await_parked(self) -> None:
        """What is on its way to where it is parked has arrived."""
        settle(self._sending)
        self._sending.clear()

    def _set(self, masks: Masks, compact: bool, tensors: Mapping[str, Tensor]) -> None:
        self.masks, self.compact = masks, compact
        self._unhook()
        self._hook(tensors)

    def follow_tensors(self) -> None:
        self._follow(self.tensors())

    def _follow(self, tensors: Mapping[str, Tensor]) -> None:
        """What is parked goes where the user took the model: other number types, devices, objects."""
        known: dict = {}
        moved = self._rest is not None and self._rest.strayed(tensors)
        for spot in (s for s in self._spots if s.home is not None and s.name in tensors):
            moved |= follow(
                spot, tensors[spot.name], self.masks, self.park_on if self.compact else None, known
            )
        if moved:
            self._set(self.masks, self.compact, tensors)

    def recheck(self) -> None:
        """`Changed` unless the tensors are those that were left, or others of their names and shapes."""
        tensors = self.tensors()
        self._require_as_laid(tensors)
        self._follow(tensors)

    def _require_as_laid(self, tensors: Mapping[str, Tensor]) -> None:
        require_as_laid(self._spots, tensors, compact=self.compact)

    def rest(self) -> None:
        """What is dormant stands as it does between two steps, whatever was written since (masked layout)."""
        if self._rest is not None:
            self._rest.between()

    @property
    def rests(self) -> bool:
        return self._rest is not None

    def quiet(self, state: Mapping[str, Any], prefix: str) -> bool:
        """Is nothing of dormant units read in this dense state dict?"""
        for spot in self._spots:
            value = state.get(prefix + spot.name)
            if not isinstance(value, Tensor):
                continue
            value = self.own(spot.name, value)
            for dim, index in at(spot.cuts, "silent").items():
                if value.index_select(dim, index.to(value.device)).any():
                    return False
        return True

    @property
    def spots(self) -> tuple[Spot, ...]:
        """The tensors that units stand in, with what is parked of them: to read, not to change."""
        self._await_parked()
        return self._spots

    def expect(self, kind: Kind | None) -> None:
        self._expected = kind is not None
        if self._rest is not None:
            self._rest.expect(self._expected)

    def read_later(self, later: Later) -> None:
        """Gradients are averaged over replicas: `later` calls back when they are, in every backward pass."""
        self._later = later
        self._unhook()
        self._hook(self.tensors())

    def release(self) -> None:
        """Back to dense with all learned weights; no hook is left, nothing is parked."""
        self.apply(all_on(self.structure), compact=False)

    def harden(self) -> None:
        """Compact for good: what is parked is dropped, model and optimizer are plain small ones."""
        self.apply(self.masks, compact=True)
        self._hardened = True
        self._spots, self._gather = (), None
        before, parameters = self.tensors(), set(self.model.parameters())
        remove(self.model, off(self.structure.branches, self.masks))
        forget(self.optimizer, parameters - set(self.model.parameters()))
        self.removed = {name: before[name] for name in before.keys() - self.tensors().keys()}

    def gate_gradient(self, only: Collection[int] | None = None) -> Tensor:
        plan, tensors = self._plan()
        watches = {} if self._rest is None else self._rest.watches

        def asked(spot: Spot) -> bool:
            return only is None or id(tensors[spot.name]) in only

        def pair(spot: Spot, dim: int) -> Pair:
            tensor = tensors[spot.name]
            return tensor, tensor.grad if asked(spot) else None

        def parked(spot: Spot, dim: int) -> Tensor | None:
            return watches[spot.name].read(dim) if spot.name in watches and asked(spot) else None

        return per_unit(plan, pair, parked)

    @property
    def has_gradients(self) -> bool:
        """Has anything that units stand in a gradient now?"""
        if not self._seen:
            tensors = self.tensors()
            self._seen = {s.name: tensors[s.name] for s in self._spots if s.name in tensors}
        for tensor in self._seen.values():  # noqa: SIM110  (asked at every step; nearly always the first tells)
            if tensor.grad is not None:
                return True
        return False

    @property
    def observable(self) -> tuple[bool, ...]:
        """Per group: is all trained that reads its units, so that ∂L/∂g is known?"""
        plan, tensors = self._plan()
        read = [spot for bundle in plan.bundles for spot in bundle.spots]
        if all(spot.is_parameter and tensors[spot.name].requires_grad for spot in read):
            return (True,) * len(self.structure.groups)
        frozen = {
            g
            for spot in self._spots
            for groups in spot.reads.values()
            for g in groups
            if not (spot.is_parameter and tensors[spot.name].requires_grad)
        }
        return tuple(g not in frozen for g in range(len(self.structure.groups)))

    def weight_norms(self) -> list[Tensor]:
        """Σ w² over the reader columns of each unit, parked ones included: float32 of N_g per group."""
        plan, tensors = self._plan()

        def pair(spot: Spot, dim: int) -> Pair:
            tensor = tensors[spot.name]
            heard = tensor if self.compact else select_others(tensor, spot, dim)
            return heard, heard

        return list(per_unit(plan, pair, self._parked_norms).split(self.structure.sizes))

    def _parked_norms(self, spot: Spot, dim: int) -> Tensor:
        """Of its silent positions; they are what they are until the next layout."""
        if (spot.name, dim) not in self._parked:
            assert spot.home is not None
            silent = spot.cuts[dim].silent
            home = spot.home.to(silent.device, non_blocking=True)
            columns = select_others(home.index_select(dim, silent), spot, dim)
            self._parked[spot.name, dim] = inner(columns, columns, dim)
        return self._parked[spot.name, dim]

    def state_dict(self) -> dict[str, Tensor]:
        """Masks, layout and what is parked, as plain tensors (for safetensors); not the live weights."""
        found = {f"mask/{name}": m.clone() for name, m in zip(self.structure.names, self.masks, strict=True)}
        found["compact"] = torch.tensor(self.compact)
        self._await_parked()
        for spot in self._spots:
            found |= {f"parked/{escaped(spot.name)}/{key}": value for key, value in pack(spot).items()}
        return found

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Go to the saved masks and layout, and park what was parked then.

        The live weights are the model's own: load its state dict afterwards (its shapes fit then), or
        before if it was saved dense. The optimizer's may be loaded before or after.
        """
        masks, packed = parsed(saved, self.structure, self._spots)
        compact = bool(saved["compact"])
        tensors = self.tensors()
        with small_state_aside(self.optimizer, self._spots, tensors, masks):
            self.apply(masks, compact=compact)
        tensors = self.tensors()
        self._await_parked()
        with torch.no_grad():
            for spot in self._spots:
                where = (self.park_on if compact else None) or tensors[spot.name].device
                unpack(spot, packed[spot.name], where)
        self._unhook()
        self._hook(tensors)

    def _plan(self) -> tuple[Gather, dict[str, Tensor]]:
        """Which positions of which reader tensors tell of which unit, worked out once per layout."""
        if self._gather is None:
            tensors = self.tensors()
            self._require_as_laid(tensors)
            self._seen = {spot.name: tensors[spot.name] for spot in self._spots}
            self._gather = gather(self._counted, tensors, self.masks, self.compact)
        return self._gather, self._seen

    def _state(self, spot: Spot, tensor: Tensor) -> dict[str, tuple[int, ...]]:
        return travelling(self.optimizer, tensor, spot.name, self._summed) if spot.is_parameter else {}

    def _check(self) -> None:
        tensors = self.tensors()
        for spot in self._spots:
            if spot.name not in tensors:
                raise ValueError(f"structure: the model has no tensor {spot.name!r}; analyse this very model")
            if tensors[spot.name].shape != spot.shape:
                raise ValueError(
                    f"structure: {spot.name!r} has shape {tuple(tensors[spot.name].shape)}, the analysis "
                    f"says {tuple(spot.shape)}; analyse the model as it is now"
                )
        if self.optimizer is not None:
            check_optimizer(self.optimizer, {s.name: tensors[s.name] for s in self._spots if s.is_parameter})
        for g, group in enumerate(self.structure.groups):
            if not any(g in reads for spot in self._spots for reads in spot.reads.values()):
                raise ValueError(f"structure: nothing reads group {group.name!r}, so it cannot be masked")

    def _hook(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep what is dormant at rest from here on (masked layout only)."""
        resting = [] if self.compact else [s for s in self._spots if s.is_parameter and s.cuts]
        if resting:
            took = Link(self, Plant.follow_tensors)
            self._rest = Rest(
                self.model, self.optimizer, resting, tensors, self._later, took, expected=self._expected
            )

    def _unhook(self) -> None:
        if self._rest is not None:
            self._rest.remove()
        self._rest, self._gather, self._seen, self._parked = None, None, {}, {}


def spots_of(structure: Structure) -> tuple[Spot, ...]:
    reads: dict[str, dict[int, set[int]]] = {}
    parts: dict[str, dict[int, Extent]] = {}
    for g, group in enumerate(structure.groups):
        for s in group.readers:
            reads.setdefault(s.tensor, {}).setdefault(s.dim, set()).add(g)
            if s.partial:
                parts.setdefault(s.tensor, {})[s.dim] = s.extent  # the same of all groups
    found = []
    for name, extents in structure.tensors.items():
        groups = frozenset().union(*(groups_in(extent) for extent in extents))
        if groups:
            read = {dim: frozenset(which) for dim, which in reads.get(name, {}).items()}
            found.append(Spot(name, extents, name in structure.parameters, read, groups, parts.get(name, {})))
    return tuple(found)
