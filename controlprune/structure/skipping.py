"""Branches that are off are not run: their modules hand on zeros, or their input, in their own class's place.

Only `module.__class__` is another (structure/standins.py): what else the code around it asks of the module is
there. Its parameters are empty while it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .groups import Branch
from .standins import StandIn, no_fused_layers, restore, stand_in

__all__ = ["Entry", "Skipped", "off", "skip", "skip_for_good"]

Entry = tuple[
    str, bool, int
]  # module, does it hand on zeros? of how many is its output a tuple (0: a tensor)?


class Skipped(StandIn):
    """A module that is not run."""

    _skip: tuple[bool, int]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first tensor that was given, or zeros like it, as the module would return it."""
        zeros, returns = self._skip
        given = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        found = torch.zeros_like(given) if zeros else given
        return (found, *[None] * (returns - 1)) if returns else found

    def extra_repr(self) -> str:
        return f"skipped: hands on {'zeros' if self._skip[0] else 'its input'}"


def off(branches: Iterable[Branch], masks: Sequence[Tensor]) -> list[Entry]:
    """The modules of those that are off."""
    gone = (branch for branch in branches if not bool(masks[branch.group].any()))
    return [(name, name == branch.ends, n) for branch in gone for name, n in branch.returns.items()]


def skip(model: nn.Module, branches: Sequence[Branch], masks: Sequence[Tensor] | None) -> None:
    """Those that are off under `masks` are not run; None: all are."""
    if not branches:
        return
    modules = dict(model.named_modules())
    for name in (name for branch in branches for name in branch.returns):
        restore(modules[name], Skipped)
        vars(modules[name]).pop("_skip", None)
    skip_for_good(model, [] if masks is None else off(branches, masks))


def skip_for_good(model: nn.Module, entries: Iterable[Entry]) -> None:
    """These are not run any more."""
    modules = dict(model.named_modules())
    for name, zeros, returns in entries:
        stand_in(modules[name], Skipped)
        vars(modules[name])["_skip"] = (zeros, returns)
    no_fused_layers(model)
