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

`m` is −1 (all bits) or 0, one int8 a weight on the weight's device: masking is a bitwise AND, for which NaN
and inf are zero like any other. In files a mask takes a bit a weight.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..structure.groups import Group, Structure
from .base import BasePlant, Kind
from .gate_gradients import Later
from .hooks import Link
from .interrupts import uninterrupted
from .joint import members
from .masks import Masks, all_on, checked, from_bits, to_bits
from .rest import elsewhere

__all__ = ["EntryPlant", "silence_"]

KEEPS_ZERO = (
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.NAdam,
    torch.optim.RAdam, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.Rprop,
    torch.optim.ASGD,
)  # fmt: skip
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def silence_(tensor: Tensor, keep: Tensor) -> None:
    """Zero where `keep` (int8) is 0, the same bits where it is −1; in place, unseen by autograd."""
    if tensor.layout == torch.sparse_coo:  # rows of an embedding
        tensor, keep = tensor._values(), keep[tensor._indices()[0]]
    bits = BITS.get(tensor.element_size())
    if bits is None:  # complex128
        tensor.data.mul_(keep.bool())
    else:
        tensor.data.view(bits).bitwise_and_(keep)


@dataclass
class Place:
    """One parameter whose entries are units, or belong to them."""

    group: Group
    parameter: nn.Parameter
    keep: Tensor | None = None  # None: every unit is on
    version: int = -1  # of the weights, when they were last known to be masked
    known: Callable[[], Tensor | None] = lambda: None  # the gradient that is masked
    grad_version: int = -1
    aside: Tensor | None = None  # of dormant entries, Σ over backward passes
    norm: Tensor | None = None  # of the masked gradient, when that was put aside

    def silence_gradient(self) -> None:
        gradient, keep = self.parameter.grad, self.here
        if gradient is None or keep is None:
            return
        if self.known() is not gradient or gradient._version != self.grad_version:
            silence_(gradient, keep)
            self.known, self.grad_version = weakref.ref(gradient), gradient._version

    def put_aside(self) -> None:
        """What of the gradient is dormant, before it is masked."""
        gradient, keep = self.parameter.grad, self.here
        if gradient is None or keep is None:
            return
        part = gradient.detach().to_dense() if gradient.layout != torch.strided else gradient.detach().clone()
        silence_(part, ~keep)
        self.aside = part if self.aside is None else self.aside + part
        self.known = lambda: None
        self.silence_gradient()
        self.norm = torch.linalg.vector_norm(_dense(gradient))

    @property
    def here(self) -> Tensor | None:
        """The mask, where the weights are now."""
        if self.keep is not None and self.keep.device != self.parameter.device:
            self.keep = self.keep.to(self.parameter.device)
        return self.keep

    def gradient(self) -> Tensor | None:
        """∂w of every entry at the scale that `.grad` has now."""
        if self.parameter.grad is None:
            return None
        now = _dense(self.parameter.grad)
        if self.aside is None:
            return now
        ratio = 1.0
        if self.norm is not None:
            size = torch.linalg.vector_norm(now)
            ratio = torch.where(self.norm > 0, size / self.norm, 1.0)
        return now + self.aside * ratio


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
                        self._silence_all(place, known)
                place.keep, place.aside = keep, None
                place.version, place.known = place.parameter._version, lambda: None
        self._unhook()
        self._hook()

    def _keep(self, place: Place, mask: Tensor) -> Tensor | None:
        if bool(mask.all()):
            return None
        weights = place.parameter
        keep = torch.empty_like(weights, dtype=torch.int8, requires_grad=False)
        return keep.copy_(self._entries(place, mask).to(weights.device)).neg_()

    def _silence_all(self, place: Place, keep: Tensor) -> None:
        parameter = place.parameter
        silence_(parameter, keep)
        if parameter.grad is not None:
            silence_(parameter.grad, keep)
        for key, value in self._state(parameter):
            if value.shape == parameter.shape and value.layout == torch.strided and key != "step_size":
                silence_(value, keep)  # Rprop's step_size is a rate, no momentum: a weight returns with it

    def _state(self, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
        entries = {} if self.optimizer is None else self.optimizer.state.get(parameter, {})
        yield from ((key, value) for key, value in entries.items() if isinstance(value, Tensor))

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

    @uninterrupted
    def rest(self) -> None:
        for place in self._places:
            keep = place.here
            if keep is not None and (self.optimizer is None or place.parameter._version != place.version):
                silence_(place.parameter, keep)
                place.version = place.parameter._version

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
        if self._kind is not None and (gradient is None or not bool(_dense(gradient).any())):
            place.aside = None

    @torch.no_grad()
    def _arrived(self, parameter: Tensor) -> None:
        place = self._by_id[id(parameter)]
        if self._kind is None:
            place.known = lambda: None
            place.silence_gradient()
        elif self._later is None:
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
        rows = [self._seen(place, kind, only) for place in self._places]
        device = rows[0].device
        return torch.cat([row.to(device, torch.float32) for row in rows])

    def _seen(self, place: Place, kind: Kind, only: Collection[int] | None) -> Tensor:
        weights = place.parameter.detach()
        heard = only is None or id(place.parameter) in only
        gradient = place.gradient() if heard else None
        if gradient is None:
            return torch.zeros(place.group.size, device=weights.device)
        if kind == "entry":
            return self._units(place, gradient)
        gate = weights * gradient
        if kind == "return" and place.here is not None:
            on = place.here != 0
            size = (weights.square().sum() / on.sum()).sqrt()
            gate = torch.where(on, gate, -size * gradient.abs())
        return self._units(place, gate)

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


def _dense(gradient: Tensor) -> Tensor:
    return gradient.detach().to_dense() if gradient.layout != torch.strided else gradient.detach()
