"""The user's own checkpoints keep working: which units are on travels with them.

The keys of `model.state_dict()` stay the user's: masks and layout are written beside them, in the metadata
that torch keeps and saves with every state dict; `optimizer.state_dict()` has them as one entry more. When
such a dict is loaded into an attached model or its optimizer, the plant first goes to the masks it was
saved at, so any order of loading works. A dict without them

    fits the present widths, and dormant columns are zero in it     is loaded as it is
    is dense                                                        is loaded with every unit on
    anything else                                                   is refused (optimizer: it waits)

`deepcopy` and `pickle` of an attached model give a plain one: in it the hooks do nothing.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..plant.base import BasePlant
from ..plant.hooks import Link
from ..plant.joint import members
from ..plant.masks import from_bits, to_bits
from ..structure.extents import size
from .saver import Saver

__all__ = ["Checkpoints"]

KEY = "controlprune"

taken: weakref.WeakKeyDictionary[Optimizer, set[str]] = weakref.WeakKeyDictionary()  # entries in use


class Checkpoints:
    """Hooks on `state_dict` and `load_state_dict` of one model and its optimizer."""

    def __init__(
        self,
        plant: BasePlant,
        optimizer: Optimizer | None,
        relayout: Callable[[tuple[Tensor, ...], bool], None],
    ):
        self.plant, self.optimizers, self.relayout = plant, members(optimizer), relayout
        self.waiting: list[tuple[Optimizer, Tensor, Any]] = []
        self.keys = {id(o): _own_key(o) for o in self.optimizers}
        self.saver = Saver.before(plant)
        self.handles = [
            plant.model.register_state_dict_post_hook(Link(self, Checkpoints._save_model)),
            plant.model.register_load_state_dict_pre_hook(Link(self, Checkpoints._load_model)),
        ]
        for o in self.optimizers:
            self.handles += [
                o.register_state_dict_post_hook(Link(self, Checkpoints._save_optimizer)),
                o.register_load_state_dict_pre_hook(Link(self, Checkpoints._load_optimizer)),
                o.register_load_state_dict_post_hook(Link(self, Checkpoints._arrived)),
            ]

    def remove(self, *, small: bool = False) -> None:
        """`small`: the model stays as small as it is; else it is as it was found."""
        for handle in self.handles:
            handle.remove()
        for o in self.optimizers:
            taken.get(o, set()).discard(self.keys[id(o)])
        if self.saver is not None:
            self.saver.stay() if small else self.saver.leave()

    # --- the hooks ------------------------------------------------------------------------------

    def _save_model(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
    ) -> None:
        metadata[KEY] = self._describe()

    def _load_model(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any], *rest: Any
    ) -> None:
        saved = metadata.get(KEY)
        if saved is None:
            self._take_unmarked(state, prefix)
        else:
            masks, compact = self._parsed(saved)
            wrong = self._misfit(state, prefix, self.plant.widths_at(masks, compact))
            if wrong:
                raise ValueError(f"state_dict: {wrong} has not the shape that its masks say; it is corrupt")
            with self.plant.loading():
                self.relayout(masks, compact)

    def _save_optimizer(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        state[self.keys[id(optimizer)]] = self._describe()

    def _load_optimizer(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        self.waiting = [entry for entry in self.waiting if entry[0] is not optimizer]
        key = self.keys[id(optimizer)]
        count = [len(group["params"]) for group in state["param_groups"]]
        if count != [len(group["params"]) for group in optimizer.param_groups]:
            return  # torch refuses it
        if key in state:
            with self.plant.loading():
                self.relayout(*self._parsed(state[key]))

    def _arrived(self, optimizer: Optimizer) -> None:
        self.set_aside()

    # --- masks that travel ----------------------------------------------------------------------

    def _describe(self) -> dict[str, Any]:
        names = self.plant.structure.names
        kept = to_bits if self.plant.packs else torch.clone
        masks = {name: kept(mask) for name, mask in zip(names, self.plant.masks, strict=True)}
        return {"masks": masks, "compact": self.plant.compact}

    def _parsed(self, saved: Any) -> tuple[tuple[Tensor, ...], bool]:
        try:
            masks, compact = dict(saved["masks"]), bool(saved["compact"])
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"state_dict: what it says of masks cannot be read ({error!r})") from error
        structure = self.plant.structure
        if self.plant.packs:
            known = dict(zip(structure.names, structure.sizes, strict=True))
            masks = {name: from_bits(mask, known.get(name, 0)) for name, mask in masks.items()}
        sizes = {name: tuple(mask.shape) for name, mask in masks.items()}
        if sizes != {name: (n,) for name, n in zip(structure.names, structure.sizes, strict=True)}:
            raise ValueError(
                f"state_dict: it was saved from a model with the groups {_few(sizes)}, this one "
                f"has {_few(dict(zip(structure.names, structure.sizes, strict=True)))}: it is another model's"
            )
        return tuple(masks[name].cpu() for name in structure.names), compact

    def _take_unmarked(self, state: Mapping[str, Any], prefix: str) -> None:
        """A dict that does not say which units it holds."""
        plant = self.plant
        if not self._misfit(state, prefix, plant.widths) and (plant.compact or plant.quiet(state, prefix)):
            return
        wrong = self._misfit(state, prefix, None)
        if wrong:
            raise ValueError(
                f"state_dict: {wrong} has neither the dense shape nor that of the present widths, and "
                "the dict does not say which units it holds; load it with controlprune.load, or load the "
                "controller's state_dict first"
            )
        with plant.loading():
            self.relayout(tuple(torch.ones_like(m) for m in plant.masks), False)

    def _misfit(self, state: Mapping[str, Any], prefix: str, widths: tuple[int, ...] | None) -> str:
        """The first tensor whose shape is not that of the given widths (`None`: dense)."""
        for name, extents in self.plant.structure.tensors.items():
            value = state.get(prefix + name)
            if isinstance(value, Tensor) and tuple(value.shape) != tuple(size(e, widths) for e in extents):
                return prefix + name
        return ""

    # --- optimizer state that does not say its masks --------------------------------------------

    def set_aside(self) -> None:
        """Optimizer state whose shape is not the parameter's waits until it is."""
        own = {id(p) for p in self.plant.model.parameters()}
        for optimizer in self.optimizers:
            for parameter, state in list(optimizer.state.items()):
                if id(parameter) in own and not _fits(parameter, state):
                    self.waiting.append((optimizer, parameter, optimizer.state.pop(parameter)))

    def admit(self) -> None:
        waiting, self.waiting = self.waiting, []
        for optimizer, parameter, state in waiting:
            if _fits(parameter, state):
                optimizer.state[parameter] = state
            else:
                self.waiting.append((optimizer, parameter, state))

    def require_admitted(self) -> None:
        if self.waiting:
            shapes = [tuple(parameter.shape) for _, parameter, _ in self.waiting][:3]
            raise RuntimeError(
                f"optimizer: the state that was loaded does not fit the model's present widths (shapes "
                f"{shapes}); load the model's or controller's state_dict of the same checkpoint too"
            )


def _fits(parameter: Tensor, state: Any) -> bool:
    tensors = [
        x for x in state.values() if isinstance(x, Tensor) and x.ndim == parameter.ndim and x.numel() > 1
    ]
    return all(all(s in (p, 1) for s, p in zip(x.shape, parameter.shape, strict=True)) for x in tensors)


def _own_key(optimizer: Optimizer) -> str:
    """What this controller's entry in the optimizer's state dict is called: one may serve several models."""
    used = taken.setdefault(optimizer, set())
    key = next(name for n in itertools.count() if (name := f"{KEY}.{n}" if n else KEY) not in used)
    used.add(key)
    return key


def _few(sizes: Mapping[str, object]) -> str:
    listed = [f"{name} {value}" for name, value in list(sizes.items())[:3]]
    return ", ".join(listed) + (", …" if len(sizes) > 3 else "")
