"""`model.save_pretrained` of a model that has such a method, while and after a controller is at work on it.

A folder of widths that are not the class's own cannot be loaded by the class alone. The record of the
widths (state/widths.py) is therefore kept with the model: in its `config`, if it has one, else in an
attribute. A plain `save_pretrained` then writes it too, and a warning says which call reads it.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..plant.base import BasePlant
from ..structure.groups import widths_of
from .widths import picked, record

__all__ = ["KEY", "Saver", "present_record", "recorded", "remembered"]

KEY = "controlprune"


def carrier(model: nn.Module) -> object:
    """What of the model is saved with its weights: its configuration, or itself."""
    config = getattr(model, "config", None)
    return config if hasattr(config, "to_dict") else model


def remembered(model: nn.Module) -> Mapping[str, Any] | None:
    """The record that the model carries."""
    found = getattr(carrier(model), KEY, None)
    return found if isinstance(found, Mapping) else None


def present_record(plant: BasePlant) -> dict[str, Any]:
    """Of the active units of this moment, over what the model carries."""
    before = remembered(plant.model)
    found = record(plant.structure, widths_of(plant.masks), before)
    where = picked(plant.structure, plant.masks, _unsaved(plant.model), before)
    return found | ({"picked": where} if where else {})


def _unsaved(model: nn.Module) -> list[str]:
    """The buffers that are in no state dict."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._buffers.keys() & module._non_persistent_buffers_set
        if module._buffers[name] is not None
    ]


@contextmanager
def recorded(model: nn.Module, widths: Mapping[str, Any]) -> Iterator[None]:
    """The model carries this record while the block runs."""
    owner = carrier(model)
    before = getattr(owner, KEY, None)
    setattr(owner, KEY, widths)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, KEY)
        else:
            setattr(owner, KEY, before)


class Saver:
    """Stands before `save_pretrained` of one model."""

    def __init__(self, model: nn.Module, plant: BasePlant | None = None) -> None:
        self.model = model
        self.plant: Callable[[], BasePlant | None] = _nothing if plant is None else weakref.ref(plant)
        self.quiet = False

    @staticmethod
    def before(plant: BasePlant) -> Saver | None:
        """Put in place, if the model has such a method."""
        if not callable(getattr(type(plant.model), "save_pretrained", None)):
            return None
        saver = Saver(plant.model, plant)
        vars(plant.model)["save_pretrained"] = saver
        return saver

    def __call__(self, *args: Any, **options: Any) -> Any:
        plant = self.plant()
        widths = remembered(self.model) if plant is None or not plant.compact else present_record(plant)
        if not widths:
            return type(self.model).save_pretrained(self.model, *args, **options)  # type: ignore[attr-defined]
        if not self.quiet:
            name = type(self.model).__name__
            warnings.warn(
                "controlprune: save_pretrained: this model's widths are not its class's own, so the class "
                "alone cannot load it; save it with controlprune.save_pretrained(controller, folder) and "
                f"load it with controlprune.from_pretrained(folder, {name}), which reads this folder too",
                stacklevel=2,
            )
        with recorded(self.model, widths):
            return type(self.model).save_pretrained(self.model, *args, **options)  # type: ignore[attr-defined]

    def stay(self) -> None:
        """The model is small for good: it carries the record, and nothing of the run."""
        plant = self.plant()
        if plant is not None:
            setattr(carrier(self.model), KEY, present_record(plant))
        self.plant = _nothing

    def leave(self) -> None:
        vars(self.model).pop("save_pretrained", None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Saver:
        other = Saver(copy.deepcopy(self.model, memo))
        other.quiet = self.quiet
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.model, "save_pretrained")


def _nothing() -> None:
    """No controller is at work."""
