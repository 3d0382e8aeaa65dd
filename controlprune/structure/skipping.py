"""Branches that are off are not run: their modules hand on zeros.

    Skipped    while it may come back: `module.__class__` alone is another (structure/standins.py), its
               parameters are empty; what else the code around it asks of the module is there
    Removed    for good: the same object, of a class without a past; parameters and buffers are None, as torch
               writes that there are none, what was inside is gone

A branch whose removal the code around it would notice (`Branch.stays`, tried at attach on a copy) is skipped
for good instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

from torch import Tensor, nn

from .groups import Branch
from .standins import HandsZeros, StandIn, no_fused_layers, restore, stand_in

__all__ = ["Entry", "Removed", "Skipped", "off", "remove", "skip", "skip_for_good"]

Entry: TypeAlias = tuple[str, int, bool]
"""Module; of how many is its output a tuple (0: a tensor)? does it stay?"""


class Skipped(StandIn):
    """A module that is not run now, whatever other stand-ins it belongs to."""

    forward, extra_repr = HandsZeros.forward, HandsZeros.extra_repr


class Removed(HandsZeros):
    """What stands where a module was; a hook or a reference to it is to the same object."""


def off(branches: Iterable[Branch], masks: Sequence[Tensor]) -> list[Entry]:
    """The modules of those that are off."""
    gone = (branch for branch in branches if not bool(masks[branch.group].any()))
    return [(name, n, b.stays) for b in gone for name, n in b.returns.items()]


def skip(model: nn.Module, branches: Sequence[Branch], masks: Sequence[Tensor] | None) -> None:
    """Those that are off under `masks` are not run; None: all are."""
    if not branches:
        return
    modules = dict(model.named_modules())
    for name in (name for branch in branches for name in branch.returns):
        restore(modules[name], Skipped)
        vars(modules[name]).pop("_skip", None)
    _skip(model, [] if masks is None else off(branches, masks))


def skip_for_good(model: nn.Module, entries: Sequence[Entry]) -> None:
    """These are not run any more, and out of the model where that is possible."""
    if entries:
        _skip(model, entries)
        remove(model, entries)


def remove(model: nn.Module, entries: Iterable[Entry]) -> None:
    """Those of them that do not stay, skipped as they are, are taken out."""
    modules = dict(model.named_modules())
    for module in (modules[name] for name, _, stays in entries if not stays):
        module.__class__ = Removed
        module._parameters = dict.fromkeys(module._parameters)
        module._buffers = dict.fromkeys(module._buffers)
        module._modules = {}


def _skip(model: nn.Module, entries: Iterable[Entry]) -> None:
    modules = dict(model.named_modules())
    for name, returns, _ in entries:
        stand_in(modules[name], Skipped)
        vars(modules[name])["_skip"] = returns
    no_fused_layers(model)
