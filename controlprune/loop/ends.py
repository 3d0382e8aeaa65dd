"""Which models are under control; ends and moves of several plants at once: the model's own and those of the
copies that follow it."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NoReturn, Protocol

from torch import Tensor, nn

from ..plant.base import BasePlant

__all__ = ["Bound", "abandon", "apply_to_all", "attached", "require_unattached"]

log = logging.getLogger("controlprune")
# model -> its `Run`
attached: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def require_unattached(model: nn.Module) -> None:
    """RuntimeError if a controller is at work on this model, or on parameters of it."""
    own = {id(parameter) for parameter in model.parameters()}
    for other, reference in attached.items():
        if reference() is None or own.isdisjoint(id(parameter) for parameter in other.parameters()):
            continue
        whose = "it" if other is model else f"a {type(other).__name__} that shares parameters with it"
        raise RuntimeError(
            f"model: a controller is attached to {whose}; call its finalize() or detach() first"
        )


class Removable(Protocol):
    def remove(self) -> None: ...


class Bound:
    """What belongs to one model and its optimizer: `copy`, `deepcopy` and `pickle` are refused."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "controller: it belongs to one model and its optimizer and cannot be copied or pickled; keep its "
            "state_dict(), or attach a new one to the copies and load it there"
        )


def apply_to_all(plants: Sequence[BasePlant], masks: Sequence[Tensor], *, compact: bool) -> None:
    """All of them go to these masks, or none."""
    with ExitStack() as undo:
        for plant in plants:
            before, was_compact = plant.masks, plant.compact
            plant.apply(masks, compact=compact)
            undo.callback(plant.apply, before, compact=was_compact)
        undo.pop_all()


def abandon(plant: BasePlant, followers: Sequence[BasePlant], handles: Sequence[Removable]) -> None:
    """The controller is gone, neither finalized nor detached: the model is left as `detach` does."""
    for handle in handles:
        handle.remove()
    if not all(bool(mask.all()) for mask in plant.masks):
        log.warning("a controller was dropped without finalize() or detach(): its model is dense again")
    for one in (plant, *followers):
        try:
            one.release()
        except RuntimeError as error:
            log.warning("a model could not be made dense again: %s", error)
