"""Sharded parameters: FSDP2 (`fully_shard`), HSDP and tensor parallelism, whose parameters are DTensors.

A rank holds a window of each parameter, positions a … a + k − 1 of some dimension (plant/shards.py). To the
plant that is a tensor like any other, its extent there a `Window`: masks, parked columns and rows at rest are
index arithmetic on the local part, in place, with no communication. Of a sum over units a rank has what it
holds:

    Σ_{reader columns} ⟨w, ∂w⟩  =  Σ_ranks of the local sums            one all-reduce of U float32 numbers

where a part that several ranks hold alike (HSDP, replicated norms) is counted by the lowest of them.
Gradients are averaged over the data by then: n ranks of B examples see what one process with n·B would.

**A shrink** stops the world: one tensor after the other is gathered, cut as one process cuts it, and laid out
again under the same mesh (plant/fsdp.py), its optimizer state and gradient with it. No process ever holds
more than one whole tensor. What is parked are the dense parts, on `park_on` if given. Under tensor
parallelism, shards along other dimensions than rows and offloading to the CPU, shapes stay
(`Control(shrink=False)`).

The trace is made before the parameters are sharded::

    traced = cp.trace(model, example_inputs)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    controller = cp.attach(model, optimizer, example_inputs=traced, …)
    …
    controller.finalize()                          the same sharded model, small
    small = controller.finalize(into=Net())        or gathered, on every rank; `Net()`: a plain dense one

A rank that dies meanwhile ends the others with an error of the collective: go on from the last checkpoint.
`state_dict` is a collective; it is that of one process, and goes back to any number of ranks.

Known limits: Adafactor and LBFGS, whose state is not laid out as the parameter is, are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..structure.caches import drop_caches
from ..structure.extents import keep
from ..structure.groups import Structure, widths_of
from ..structure.sizes import set_sizes
from ..structure.standins import count_live
from .base import named_tensors
from .fsdp import managed, relay, reshapes, resharded, sharded_like
from .hooks import Link
from .layout import Spot, Switch, at, cuts_of, move, put_, select
from .masks import Masks, all_on, checked
from .optimizer import require_nothing_beside
from .parked import escaped, pack, parsed, unpack
from .parking import fetched, parked
from .plant import Plant, spots_of
from .shards import LocalOptimizer, Shards, Windows, cut, full, inside, narrowed

__all__ = ["ShardedPlant"]

REFUSED = (torch.optim.LBFGS, torch.optim.Adafactor)


class ShardedPlant(Plant):
    """A plant on the parts of the parameters that this rank holds."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        structure: Structure,
        *,
        park_on: torch.device | str | None = None,
    ) -> None:
        if isinstance(optimizer, REFUSED):
            raise ValueError(
                f"optimizer: {type(optimizer).__name__} keeps state of another layout than the parameters', "
                "which cannot be sharded with them; use SGD, Adam or AdamW"
            )
        self._shards = Shards(model, optimizer)
        self._reshapes = reshapes(model)
        view: Any = LocalOptimizer(self._shards)
        self._mine: frozenset[str] = frozenset()
        self._small: tuple[Spot, ...] = ()  # compact: the dense windows in which the parts here lie
        self._absent: Tensor | None = None  # compact: norms of the units that are out of the tensors
        super().__init__(model, view, structure, park_on=park_on)
        self._uncut = {spot.name: spot for spot in spots_of(structure)}
        self._mine = self._shards.first_held([spot.name for spot in self._spots])

    # --- what of the model is here ---------------------------------------------------------------

    @property
    def shrinks(self) -> bool:  # type: ignore[override]
        return self._reshapes

    @property
    def group(self) -> Any:
        return self._shards.group

    def tensors(self) -> dict[str, Tensor]:
        return self._shards.parts

    def own(self, name: str, tensor: Tensor) -> Tensor:
        return self._shards.own(name, tensor)

    def _laid_on(self) -> tuple[Spot, ...]:
        return self._shards.spots(self.structure, self._shards.dense)

    @property
    def _counted(self) -> tuple[Spot, ...]:
        spots = self._small if self.compact else self._spots
        return tuple(spot for spot in spots if spot.name in self._mine)

    # --- masks -----------------------------------------------------------------------------------

    def apply(self, masks: Sequence[Tensor], *, compact: bool) -> None:
        if compact and not self.shrinks:
            raise RuntimeError(
                "shrink: these sharded parameters keep their shapes; attach with policy=cp.Control(shrink="
                "False); get the small model at the end by controller.finalize(into=model), model a plain "
                "dense one"
            )
        masks = checked(masks, self.structure)
        if compact:
            require_nothing_beside(self._shards.keeper)
        resharded(self.model)
        self._shards.fetch_gradients()
        compact = compact and not all(bool(mask.all()) for mask in masks)
        if (
            self.compact
            and compact
            and all(torch.equal(a, b) for a, b in zip(masks, self.masks, strict=True))
        ):
            return
        with torch.no_grad():
            if self.compact:
                self._expand()
            if compact:
                self._shrink(masks)
            else:
                super().apply(masks, compact=False)

    def _shrink(self, masks: Masks) -> None:
        """Whole tensors, cut, one after the other."""
        self._bare()
        self._absent = self._norms_at(masks)
        shards, known, kept = self._shards, {}, managed(self.model)
        for spot in self._spots:
            whole, part = shards.wholes.get(spot.name), shards.parts[spot.name]
            cuts = cuts_of(spot, masks, part.device, known)
            if whole is None:
                states = self._state(spot, part)
                move(spot, part, self.optimizer, states, cuts, Switch(False, True, self.park_on), ExitStack())
                continue
            live = at(cuts_of(self._uncut[spot.name], masks, part.device, known), "live")
            if not live:
                continue
            spot.cuts, spot.home = cuts, parked(part.detach(), self.park_on)
            grad, entries = whole.grad, shards.travelling(whole)
            relay(kept[id(whole)], select(full(whole), live))
            whole.grad = None if grad is None else cut(grad, whole, live)
            for key, entry in entries.items():
                spot.state_home[key] = parked(entry.to_local(), self.park_on)
                shards.keeper.state[whole][key] = cut(entry, whole, live)
        if self.park_on is not None:
            self._sending.add(shards.device)
        self._laid(masks, compact=True)

    def _bare(self) -> None:
        """From the masked layout to the dense one, where every tensor lies: what was parked goes at once."""
        parts = self._shards.parts
        self._require_as_laid(parts)
        self._follow(parts)
        states = {s.name: self._state(s, parts[s.name]) for s in self._spots}  # raises before any change
        self._unhook()
        for spot in (s for s in self._spots if s.cuts):
            dense = Switch(False, False, None)
            move(spot, parts[spot.name], self.optimizer, states[spot.name], {}, dense, ExitStack())

    def _norms_at(self, masks: Masks) -> Tensor:
        """What `weight_norms` would say of the masked layout, read off the dense one: no tensor is copied."""
        known: dict = {}
        for spot in self._spots:
            part = self._shards.parts[spot.name]
            spot.cuts, spot.home = cuts_of(spot, masks, part.device, known), part.detach()
        self.masks = masks
        found = torch.cat(self.weight_norms())
        self._unhook()
        for spot in self._spots:
            spot.cuts, spot.home = {}, None
        return found

    def _expand(self) -> None:
        """From the compact layout: dense, with every unit on."""
        shards, masks, known, kept = self._shards, self.masks, {}, managed(self.model)
        for spot in self._spots:
            whole, part = shards.wholes.get(spot.name), shards.parts[spot.name]
            if whole is None:
                states = self._state(spot, part)
                move(spot, part, self.optimizer, states, {}, Switch(True, False, self.park_on), ExitStack())
            elif spot.home is not None:
                live = at(cuts_of(self._uncut[spot.name], masks, part.device, known), "live")
                here = at(spot.cuts, "live")
                window = tuple(
                    inside(live[d], *pair) if d in live else pair
                    for d, pair in enumerate(shards.dense[spot.name])
                )
                grad, entries = whole.grad, shards.travelling(whole)
                home = fetched(spot.home, part)
                homes = {
                    key: put_(self._home(spot, key, x.to_local()), here, narrowed(full(x), window))
                    for key, x in entries.items()
                }
                back = None
                if grad is not None:
                    back = put_(torch.zeros_like(home), here, narrowed(full(grad), window))
                dense = shards.joined(put_(home, here, narrowed(full(whole), window)), spot.name)
                relay(kept[id(whole)], dense)
                for key, home in homes.items():
                    shards.keeper.state[whole][key] = sharded_like(whole, home)
                whole.grad = None if back is None else sharded_like(whole, back)
                spot.cuts, spot.home, spot.state_home = {}, None, {}
        self._laid(all_on(self.structure), compact=False)

    def _laid(self, masks: Masks, *, compact: bool) -> None:
        """All tensors have their new sizes: so has what is known of them."""
        widths = widths_of(masks) if compact else self.structure.sizes
        set_sizes(self.model, self.structure, widths)
        count_live(self.model, self.structure, None)
        drop_caches(self.model)
        torch.clear_autocast_cache()
        tensors, shards = named_tensors(self.model), self._shards
        shards.take(tensors)
        spans = {name: self._spans(name, masks) for name in tensors} if compact else {}
        self._small = shards.spots(self.structure, spans) if compact else ()
        self._set(masks, compact, shards.parts)
        self._mine = shards.first_held([spot.name for spot in self._spots])
        shards.fetch_gradients()

    def _spans(self, name: str, masks: Masks) -> Windows:
        """The dense positions that exactly hold the live ones here, per dimension."""
        spot, found = self._uncut.get(name), []
        for d, (start, length) in enumerate(self._shards.windows[name]):
            total = self._shards.shapes[name][d]
            live = None if spot is None else keep(spot.extents[d], masks).nonzero().flatten()
            if live is None or length == len(live):
                found.append((0, total) if live is not None else (start, length))
            elif length == 0:
                found.append((0, 0))
            else:
                first, last = int(live[start]), int(live[start + length - 1])
                found.append((first, last + 1 - first))
        return tuple(found)

    def _require_as_laid(self, tensors: Mapping[str, Tensor]) -> None:
        if not self.compact:
            super()._require_as_laid(tensors)

    def _home(self, spot: Spot, key: str, live: Tensor) -> Tensor:
        """Back beside `live`; of state that appeared while units were away: zero for them."""
        assert spot.home is not None
        if key in spot.state_home:
            return fetched(spot.state_home[key], live)
        return torch.zeros_like(spot.home, dtype=live.dtype, device=live.device)

    def harden(self) -> None:
        """Masked for good: what is parked is dropped, no hook is left."""
        self._unhook()
        self._hardened = True
        self._spots, self._gather = (), None

    def _hook(self, tensors: Mapping[str, Tensor]) -> None:
        super()._hook(tensors)
        if self._rest is None:
            return
        for name, watch in self._rest.watches.items():
            if name in self._shards.wholes:
                hook = self._arrival(name, watch.brought)
                whole = self._shards.wholes[name]
                self._rest.handles.append(whole.register_post_accumulate_grad_hook(hook))
        if self._rest.watches:
            self._rest.handles.append(self.model.register_forward_pre_hook(Link(self, ShardedPlant._settle)))

    def _arrival(self, name: str, brought: Callable[[], None]) -> Callable[[Tensor], None]:
        def arrived(whole: Tensor) -> None:
            self._shards.fetch(name)
            brought()

        return arrived

    def _settle(self, model: nn.Module, args: Any) -> None:
        """Before new gradients come: records at the scale that gradients have now, none if there are none."""
        self._shards.fetch_gradients()
        for watch in () if self._rest is None else self._rest.watches.values():
            watch.settle()

    def gathered(self, model: nn.Module) -> nn.Module:
        """A collective, one tensor after the other."""
        tensors = named_tensors(model)
        with torch.no_grad():
            for name, part in self._shards.parts.items():
                tensors[name].copy_(full(self._shards.wholes.get(name, part)))
        small = Plant(model, None, self.structure)
        small.apply(self.masks, compact=True)
        small.harden()
        return model

    # --- statistics ------------------------------------------------------------------------------

    @property
    def has_gradients(self) -> bool:
        return any(whole.grad is not None for whole in self._shards.wholes.values())

    def gate_gradient(self, only: Collection[int] | None = None) -> Tensor:
        shards = self._shards
        shards.fetch_gradients()
        if only is not None:
            only = {id(shards.parts[name]) for name, whole in shards.wholes.items() if id(whole) in only}
        return shards.summed(super().gate_gradient(only))

    def weight_norms(self) -> list[Tensor]:
        found = self._shards.summed(torch.cat(super().weight_norms()))
        if self.compact and self._absent is not None:
            found = torch.where(torch.cat(self.masks).to(found.device), found, self._absent)
        return list(found.split(self.structure.sizes))

    # --- saved -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """That of one process; a collective, one tensor after the other, kept on the CPU."""
        found = {f"mask/{name}": m.clone() for name, m in zip(self.structure.names, self.masks, strict=True)}
        found["compact"] = torch.tensor(self.compact)
        self._await_parked()
        known: dict = {}
        for spot in self._spots:
            one = replace(self._uncut[spot.name])
            one.cuts = cuts_of(one, self.masks, torch.device("cpu"), known)
            if not one.cuts:
                continue
            one.home = self._gathered_home(spot, spot.home)
            whole = self._shards.wholes.get(spot.name)
            keys = spot.state_home if whole is None else self._shards.travelling(whole)
            one.state_home = {key: self._gathered_home(spot, spot.state_home.get(key)) for key in keys}
            found |= {f"parked/{escaped(spot.name)}/{key}": value for key, value in pack(one).items()}
        return found

    def _gathered_home(self, spot: Spot, home: Tensor | None) -> Tensor:
        shards, whole = self._shards, self._shards.wholes.get(spot.name)
        if whole is None:
            assert home is not None
            return home.cpu()
        if home is None:
            home = torch.zeros([length for _, length in shards.dense[spot.name]], dtype=whole.dtype)
        return shards.joined(home.to(shards.device), spot.name).cpu()

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Every rank takes its part."""
        saved = dict(saved)
        masks, packed = parsed(saved, self.structure, tuple(self._uncut.values()))
        self.apply(masks, compact=bool(saved["compact"]))
        self._await_parked()
        known: dict = {}
        with torch.no_grad():
            for spot in self._spots:
                one = replace(self._uncut[spot.name])
                one.cuts = cuts_of(one, masks, torch.device("cpu"), known)
                if not packed[spot.name] or spot.home is None:
                    continue
                one.home = torch.zeros(one.shape, dtype=spot.home.dtype)
                one.state_home = {}
                unpack(one, packed[spot.name], torch.device("cpu"))
                mine = self._shards.dense[spot.name]
                spot.home.copy_(narrowed(one.home, mine))
                spot.state_home = {
                    key: narrowed(home, mine).to(spot.home.device, copy=True)
                    for key, home in one.state_home.items()
                }
        self._unhook()
        self._hook(self._shards.parts)
