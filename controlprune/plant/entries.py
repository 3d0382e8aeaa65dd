"""Masks on single weights, in place: what is off *is* zero, in the weight, its gradient and its momentum.

    at an update      w ← m ⊙ w,  ∂w ← m ⊙ ∂w,  every state of the optimizer of that shape likewise
    in a backward     ∂w ← m ⊙ ∂w as it arrives, so that no clipping sees the rest     (post-accumulate hook)

In between nothing needs to be done: an optimizer that works entry by entry takes zero weight, gradient and
state to zero (`KEEPS_ZERO`); after any other's step the weights are masked again. No multiplication in the
forward. A weight that returns begins at zero, its state too: what it was is gone (Mocanu et al. 2018; Evci et
al. 2020). Weights written by others in between (noise, a checkpoint) are told by their version and masked
before the next forward; what is written through `.data` is masked at the next update.

Where the loop will read gradients of dormant weights (`expect`), they are put aside as they arrive, and
follow the scale of `.grad` (unscaling, clipping) until they are read. Among replicas such a gradient is
masked only when it is averaged.

What masking one parameter is, plant/place.py. In files a mask takes a bit a weight.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace as changed
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..structure.groups import Structure
from .base import BasePlant, Kind
from .gate_gradients import Later
from .hooks import Link
from .interrupts import uninterrupted
from .joint import members
from .masks import Masks, all_on, checked, from_bits, to_bits
from .place import Place, dense, mask_like, silence_
from .rest import elsewhere

__all__ = ["EntryPlant"]

KEEPS_ZERO = (
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.NAdam,
    torch.optim.RAdam, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.Rprop,
    torch.optim.ASGD,
)  # fmt: skip


class EntryPlant(BasePlant):
    """The user's model and optimizer with any single weights off. Group g is the parameter of its name."""

    shrinks: bool = False
    packs: ClassVar[bool] = True

    def __init__(self, model: nn.Module, optimizer: Optimizer | None, structure: Structure) -> None:
        self.model, self.optimizer, self.structure = model, optimizer, structure
        parameters = dict(model.named_parameters())
        self._places = [Place(group, parameters[group.name]) for group in structure.groups]
        self._by_id = {id(place.parameter): place for place in self._places}
        self._handles: list[Any] = []
        self._kind: Kind | None = None
        self._read = True  # was what had been expected read?
        self._later: Later | None = None
        self._hardened = False
        self._exact = all(type(member) in KEEPS_ZERO for member in members(optimizer))

    # --- units and entries: one and the same here, a subclass may keep them apart -------------------

    def _entries(self, place: Place, mask: Tensor) -> Tensor:
        """A mask of units as one of entries, in the parameter's shape."""
        return mask.view(place.parameter.shape)

    def _units(self, place: Place, entries: Tensor) -> Tensor:
        """Sums over the entries of each unit."""
        return entries.flatten()

    def _on(self, place: Place, entries: Tensor) -> Tensor:
        """The reverse of `_entries`."""
        return entries.flatten()

    def _row(self, place: Place, seen: Tensor, kind: Kind) -> Tensor:
        """What is seen of each unit, of what is seen of its entries."""
        return self._units(place, seen)

    # --- masks ---------------------------------------------------------------------------------------

    @property
    def masks(self) -> Masks:  # type: ignore[override]
        return tuple(
            torch.ones(place.group.size, dtype=torch.bool)
            if place.keep is None
            else self._on(place, place.keep != 0).cpu()
            for place in self._places
        )

    @property
    def compact(self) -> bool:  # type: ignore[override]
        return False

    @uninterrupted
    def apply(self, masks: Sequence[Tensor], *, compact: bool) -> None:
        """Switch to these masks, in place; `compact` changes nothing: zeros stay in the tensors."""
        if self._hardened:
            raise RuntimeError("this model was finalized (harden); attach it anew to prune it further")
        masks = checked(masks, self.structure)
        new = [self._keep(*pair) for pair in zip(self._places, masks, strict=True)]  # before any change
        with torch.no_grad():
            for place, keep in zip(self._places, new, strict=True):
                for known in (place.here, keep):
                    if known is not None:
                        place.silence_all(known, self.optimizer)
                place.keep, place.aside = keep, None
                place.version, place.known = place.parameter._version, lambda: None
        self._unhook()
        self._hook()

    def _keep(self, place: Place, mask: Tensor) -> Tensor | None:
        if bool(mask.all()):
            return None
        weights = place.parameter
        return mask_like(weights).copy_(self._entries(place, mask).to(weights.device)).neg_()

    def quiet(self, state: Mapping[str, Any], prefix: str) -> bool:
        for place in self._places:
            value = state.get(prefix + place.group.name)
            if isinstance(value, Tensor) and place.keep is not None and value.shape == place.keep.shape:
                off = ~place.keep.to(value.device).bool()
                if bool((value.ne(0) & off).any()):
                    return False
        return True

    def follow_tensors(self) -> None:
        """A mask goes where its weights are, when it is next used."""

    def rest(self) -> None:
        anyway = self.optimizer is None
        masked = [place for place in self._places if place.keep is not None]
        written = [place for place in masked if anyway or place.parameter._version != place.version]
        if written:
            _silence_weights(written)

    def release(self) -> None:
        self.apply(all_on(self.structure), compact=False)

    def harden(self) -> None:
        self.rest()
        self._unhook()
        self._hardened = True

    @property
    def portable(self) -> tuple[Structure, Masks]:
        return changed(self.structure, groups=(), entries={}), ()

    # --- hooks ---------------------------------------------------------------------------------------

    def _hook(self) -> None:
        masked = [place for place in self._places if place.keep is not None]
        if not masked:
            return
        for place in masked:
            if place.parameter.requires_grad:
                self._handles += [
                    place.parameter.register_hook(_Arrival(self, place)),
                    place.parameter.register_post_accumulate_grad_hook(Link(self, EntryPlant._arrived)),
                ]
        self._handles += [
            self.model.register_forward_pre_hook(Link(self, EntryPlant._before_forward)),
            self.model.register_state_dict_pre_hook(Link(self, EntryPlant._before_saving)),
        ]
        if self.optimizer is not None:
            self._handles += [
                self.optimizer.register_step_pre_hook(Link(self, EntryPlant._before_step)),
                self.optimizer.register_step_post_hook(Link(self, EntryPlant._after_step)),
            ]

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def arrives(self, place: Place) -> None:
        """A gradient comes; where none was there, what was put aside is of an older one."""
        gradient = place.parameter.grad
        if self._kind is not None and (gradient is None or not bool(dense(gradient).any())):
            place.aside = None

    def _arrived(self, parameter: Tensor) -> None:
        place = self._by_id[id(parameter)]
        if self._kind is None:
            place.known = lambda: None
            place.silence_gradient()
            return
        with torch.no_grad():
            if self._later is None:
                place.put_aside()
            else:
                self._later(place.put_aside)

    def _before_forward(self, *_: Any) -> None:
        if not elsewhere():
            self.rest()

    def _before_saving(self, *_: Any) -> None:
        self.rest()

    def _before_step(self, *_: Any) -> None:
        for place in self._places:
            place.silence_gradient()

    def _after_step(self, *_: Any) -> None:
        if not self._exact:
            self.rest()
            return
        for place in self._places:
            place.version = place.parameter._version

    def read_later(self, later: Later) -> None:
        self._later = later

    # --- what is seen --------------------------------------------------------------------------------

    def expect(self, kind: Kind | None) -> None:
        if self._read or kind is None:
            for place in self._places:
                place.aside = None
        self._kind, self._read = kind, kind is None

    @property
    def has_gradients(self) -> bool:
        return any(place.parameter.grad is not None for place in self._places)

    @torch.no_grad()
    def gate_gradient(self, only: Collection[int] | None = None) -> Tensor:
        self._read = True
        kind = self._kind or "gate"
        rows = []
        for place in self._places:
            seen = place.seen(kind) if only is None or id(place.parameter) in only else None
            row = (
                place.parameter.new_zeros(place.group.size) if seen is None else self._row(place, seen, kind)
            )
            rows.append(row.to(self._places[0].parameter.device, torch.float32))
        return torch.cat(rows)

    @torch.no_grad()
    def weight_norms(self) -> list[Tensor]:
        return [self._units(place, place.parameter.detach().float().square()) for place in self._places]

    # --- saved and restored --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        names = self.structure.names
        found = {f"mask/{name}": to_bits(m) for name, m in zip(names, self.masks, strict=True)}
        return found | {"compact": torch.tensor(False)}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        wanted = {"compact", *(f"mask/{name}" for name in self.structure.names)}
        if saved.keys() != wanted:
            odd = sorted(saved.keys() ^ wanted)[0]
            raise ValueError(f"saved: {odd!r} is missing or too much; it was saved from another model")
        groups = self.structure.groups
        self.apply([from_bits(saved[f"mask/{g.name}"].cpu(), g.size) for g in groups], compact=False)


@uninterrupted
def _silence_weights(places: Sequence[Place]) -> None:
    for place in places:
        keep = place.here
        assert keep is not None
        silence_(place.parameter, keep)
        place.version = place.parameter._version


class _Arrival:
    """Before a gradient is accumulated; does nothing in a copy of the model."""

    def __init__(self, plant: EntryPlant | None, place: Place | None) -> None:
        self.owner = None if plant is None else weakref.ref(plant)
        self.place = place

    def __call__(self, gradient: Tensor) -> None:
        plant = None if self.owner is None else self.owner()
        if plant is not None and self.place is not None:
            plant.arrives(self.place)

    def __deepcopy__(self, memo: object) -> _Arrival:
        return _Arrival(None, None)

    def __reduce__(self) -> tuple[type[_Arrival], tuple[None, None]]:
        return _Arrival, (None, None)
