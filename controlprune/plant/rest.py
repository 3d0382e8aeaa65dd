"""At rest: what is dormant stays as it is between two steps of the masked layout, whatever the user does.

    gradients     arrive with the dormant columns left out, so that no clipping sees them
                  (plant/gate_gradients.py); those that were put into `.grad` by hand are cleared before the
                  optimizer runs
    weights       rows that weight decay moved are put back, columns are zero again: after every optimizer
                  step, before every forward of the model and before its state dict is taken, since weights
                  are also written elsewhere (noise, an average swapped in)

A forward under torch.compile knows no such hook; `controller.step` does the same. Gradients of
`torch.func` come from no hook: what of them stands in dormant columns counts in a clipping by norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch  # type: ignore[attr-defined]
from torch.optim import Optimizer

from .cuts import at
from .gate_gradients import Later, Watch
from .hooks import Link
from .interrupts import uninterrupted
from .layout import Spot, resting_rows
from .silence import Silence

__all__ = ["Rest", "elsewhere"]

Rows = dict[int, tuple[Tensor, Tensor]]


class Rest:
    """The hooks of one masked layout. `watches`: by name, the parameters whose dormant columns are read."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        spots: Sequence[Spot],
        tensors: Mapping[str, Tensor],
        later: Later | None,
        follow: Callable[[], None],
        *,
        expected: bool = True,
    ) -> None:
        self.follow, self.expected = follow, expected
        self.watches: dict[str, Watch] = {}
        self.handles: list[Any] = []
        self.kinds: list[tuple[torch.dtype, torch.device]] = []
        self.places: list[tuple[Tensor, Rows, Silence]] = []
        self.versions: list[int] = []  # of the weights, when they were last laid to rest
        self.hears = False  # is this asked before every forward?
        self.names = [spot.name for spot in spots]
        try:
            self._hook(model, optimizer, spots, tensors, later)
        except BaseException:
            self.remove()
            raise

    def _hook(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        spots: Sequence[Spot],
        tensors: Mapping[str, Tensor],
        later: Later | None,
    ) -> None:
        for spot in spots:
            parameter = tensors[spot.name]
            silent = at(spot.cuts, "silent")
            self.places.append((parameter, resting_rows(spot), Silence(silent)))
            if parameter.requires_grad and silent:
                self.watches[spot.name] = Watch(spot, parameter, later, expected=self.expected)
        self.kinds = [(parameter.dtype, parameter.device) for parameter, *_ in self.places]
        self.handles = [
            model.register_forward_pre_hook(Link(self, Rest._before_forward)),
            model.register_state_dict_pre_hook(Link(self, Rest._before_saving)),
        ]
        if optimizer is not None:
            self.handles += [
                optimizer.register_step_pre_hook(Link(self, Rest._before_step)),
                optimizer.register_step_post_hook(Link(self, Rest._after_step)),
            ]

    @uninterrupted
    def again(self) -> None:
        """Rows as they are parked, columns zero. Through `.data`: a living graph may hold the weights."""
        if self.kinds != [(parameter.dtype, parameter.device) for parameter, *_ in self.places]:
            self.follow()  # `model.to(…)`: another `Rest` takes over
            return
        with torch.no_grad():
            for parameter, rows, silent in self.places:
                weights = parameter.data
                for dim, (index, values) in rows.items():
                    weights.index_copy_(dim, index, values)
                silent.fill_(weights)
        self.versions = [parameter._version for parameter, *_ in self.places]

    def between(self) -> None:
        """The same after a step, unless every forward sees to it and nothing was written since the last."""
        written = self.versions != [parameter._version for parameter, *_ in self.places]
        if written or not self.hears:
            self.again()
        self.hears = False

    def expect(self, expected: bool) -> None:
        """Will gradients of dormant columns be read?"""
        self.expected = expected
        for watch in self.watches.values():
            watch.expected = expected

    def strayed(self, tensors: Mapping[str, Tensor]) -> bool:
        """Has the model other objects of the same shapes under these names now?"""
        pairs = [(tensors.get(n), p) for n, (p, *_) in zip(self.names, self.places, strict=True)]
        return any(now is not p for now, p in pairs) and all(
            now is not None and now.shape == p.shape for now, p in pairs
        )

    def remove(self) -> None:
        for handle in (*self.handles, *(h for watch in self.watches.values() for h in watch.handles)):
            handle.remove()

    def _before_forward(self, *_: Any) -> None:
        if not elsewhere():
            self.hears = True
            self.again()

    def _before_saving(self, *_: Any) -> None:
        self.again()

    def _before_step(self, *_: Any) -> None:
        for watch in self.watches.values():
            watch.sweep()

    def _after_step(self, *_: Any) -> None:
        self.again()


def elsewhere() -> bool:
    """Is a tracer at work, or a transform of `torch.func`? They do not compute with the weights."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or _functorch.peek_interpreter_stack() is not None
    )
