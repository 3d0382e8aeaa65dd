"""Weights of a small model that a framework loads before the controller is there to make room for them.

A framework resumes weights first and makes its optimizer later; a controller needs the optimizer. So weights
that do not fit wait here, and are loaded once the controller has the checkpoint's widths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..plant.hooks import Link

__all__ = ["LateWeights"]


class LateWeights:
    """Watches `load_state_dict`. `live()`: is a controller at work? Then `arriving` is told first."""

    def __init__(
        self,
        model: nn.Module,
        live: Callable[[], bool],
        arriving: Callable[[Mapping[str, Any]], None] = lambda metadata: None,
    ) -> None:
        self.model, self.live, self.arriving = model, live, arriving
        self.waiting: dict[str, Any] | None = None
        self._handle = model.register_load_state_dict_pre_hook(Link(self, LateWeights._before))

    def _before(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any], *rest: Any
    ) -> None:
        if self.live():
            self.arriving(metadata)
            return
        own = module.state_dict()
        if any(_differs(state.get(prefix + name), tensor) for name, tensor in own.items()):
            self.waiting = {name: value for name, value in state.items() if name.startswith(prefix)}
            state.update({prefix + name: tensor for name, tensor in own.items() if prefix + name in state})

    def load(self) -> None:
        """Load what waits."""
        if self.waiting is not None:
            waiting, self.waiting = self.waiting, None
            self.model.load_state_dict(waiting, strict=False)

    def remove(self) -> None:
        self._handle.remove()


def _differs(value: Any, tensor: Any) -> bool:
    return isinstance(value, Tensor) and isinstance(tensor, Tensor) and value.shape != tensor.shape
