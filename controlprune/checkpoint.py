"""The user's own checkpoints keep working: widths travel with `model.state_dict()`.

The keys of the state dict stay the user's. Which units its tensors hold is written beside them, in the
metadata that torch keeps and saves with every state dict; when such a dict is loaded into an attached
model, the model first takes these widths on. An optimizer state that arrives before the model has its
shapes waits until it fits. The hooks come off with the controller.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .masking import Plant

__all__ = ["Checkpoints"]

KEY = "controlprune"


class Checkpoints:
    """Hooks on `state_dict` and `load_state_dict` of one model and its optimizer."""

    def __init__(
        self, plant: Plant, optimizer: Optimizer, relayout: Callable[[tuple[Tensor, ...], bool], None]
    ):
        self.plant, self.optimizer, self.relayout = plant, optimizer, relayout
        self.waiting: dict[Tensor, Any] = {}
        save, load, arrive = _closures(weakref.ref(self))
        self.handles = [
            plant.model.register_state_dict_post_hook(save),
            plant.model.register_load_state_dict_pre_hook(load),
            optimizer.register_load_state_dict_post_hook(arrive),
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def describe(self) -> dict[str, Any]:
        names = self.plant.structure.names
        masks = {name: mask.clone() for name, mask in zip(names, self.plant.masks, strict=True)}
        return {"masks": masks, "compact": self.plant.compact}

    def take_on(self, state: Mapping[str, Any], prefix: str, saved: Mapping[str, Any] | None) -> None:
        """Bring the plant to the widths of the state dict that is about to be loaded."""
        if saved is None:
            wrong = self._misfits(state, prefix)
            if not wrong:
                return
            self.relayout(tuple(torch.ones_like(m) for m in self.plant.masks), False)
            wrong = self._misfits(state, prefix)
            if wrong:
                raise ValueError(
                    f"state_dict: {wrong} has neither the dense shape nor that of the present widths, and the "
                    "dict does not say which units it holds; load it with controlprune.load, or load the "
                    "controller's state_dict first"
                )
            return
        names = self.plant.structure.names
        if set(saved["masks"]) != set(names):
            raise ValueError(
                f"state_dict: it was saved from a model with the groups {sorted(saved['masks'])[:4]}…, "
                f"this one has {sorted(names)[:4]}…: it belongs to another model"
            )
        self.relayout(tuple(saved["masks"][name].cpu() for name in names), bool(saved["compact"]))

    def _misfits(self, state: Mapping[str, Any], prefix: str) -> str:
        tensors = self.plant.tensors()
        for name in self.plant.structure.tensors:
            value = state.get(prefix + name)
            if isinstance(value, Tensor) and value.shape != tensors[name].shape:
                return prefix + name
        return ""

    def set_aside(self) -> None:
        """Optimizer state whose shape is not the parameter's waits; what waited and now fits goes in."""
        for parameter, state in list(self.optimizer.state.items()):
            if not _fits(parameter, state):
                self.waiting[parameter] = self.optimizer.state.pop(parameter)

    def admit(self) -> None:
        for parameter, state in list(self.waiting.items()):
            if _fits(parameter, state):
                self.optimizer.state[parameter] = self.waiting.pop(parameter)

    def require_admitted(self) -> None:
        if self.waiting:
            shapes = [tuple(p.shape) for p in self.waiting][:3]
            raise RuntimeError(
                f"optimizer: the state that was loaded does not fit the model's present widths (parameters of "
                f"shape {shapes}); load the model's or the controller's state_dict of the same checkpoint too"
            )


def _fits(parameter: Tensor, state: Any) -> bool:
    tensors = [
        x for x in state.values() if isinstance(x, Tensor) and x.ndim == parameter.ndim and x.numel() > 1
    ]
    return all(all(s in (p, 1) for s, p in zip(x.shape, parameter.shape, strict=True)) for x in tensors)


def _closures(reference: weakref.ref[Checkpoints]) -> tuple[Callable[..., None], ...]:
    """Plain functions: a deep copy of the model copies them as they are, and they ignore the copy."""

    def mine(module: nn.Module) -> Checkpoints | None:
        owner = reference()
        return owner if owner is not None and owner.plant.model is module else None

    def save(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
        owner = mine(module)
        if owner is not None and not all(bool(m.all()) for m in owner.plant.masks):
            metadata[KEY] = owner.describe()

    def load(
        module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any
    ) -> None:
        owner = mine(module)
        if owner is not None:
            owner.take_on(state, prefix, metadata.get(KEY))

    def arrive(optimizer: Optimizer) -> None:
        owner = reference()
        if owner is not None and owner.optimizer is optimizer:
            owner.set_aside()

    return save, load, arrive
