"""The model at other widths for a moment: its tensors hold other data, its size attributes other numbers.

Only `.data` is exchanged, and put back whatever happens: the tensors stay the user's own, no copy of the
model is made, and what runs inside runs as the shrunk model would.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .caches import drop_caches
from .extents import Extent, groups_in, keep
from .groups import Structure
from .sizes import set_sizes
from .skipping import skip

__all__ = ["at_widths", "first_units", "select_live", "tensors_of"]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by their canonical names."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def select_live(value: Tensor, extents: Sequence[Extent], masks: Sequence[Tensor]) -> Tensor:
    """The entries of a dense tensor that are live under the masks."""
    for dim, extent in enumerate(extents):
        if groups_in(extent):
            value = value.index_select(dim, keep(extent, masks).nonzero().flatten().to(value.device))
    return value


def first_units(model: nn.Module, structure: Structure, widths: Sequence[int]) -> dict[str, Tensor]:
    """Every tensor of the model with the first `widths[g]` units of each group."""
    masks = _first(structure, widths)
    return {n: select_live(t.detach(), structure.tensors[n], masks) for n, t in tensors_of(model).items()}


def _first(structure: Structure, widths: Sequence[int]) -> list[Tensor]:
    return [torch.arange(n) < k for n, k in zip(structure.sizes, widths, strict=True)]


@contextmanager
def at_widths(
    model: nn.Module,
    structure: Structure,
    values: Mapping[str, Tensor],
    widths: Sequence[int] | None,
    own: Mapping[str, Tensor] | None = None,
) -> Iterator[None]:
    """Inside, the model's tensors hold `values`, its size attributes are those of `widths`, and branches of
    width 0 are not run.

    `own`: the model's tensors, where they are known. What modules cache of their weights is dropped on the
    way in; `untouched` around it restores that too.
    """
    own = tensors_of(model) if own is None else own
    before = {name: own[name].data for name in values}
    try:
        for name, value in values.items():
            own[name].data = value
        set_sizes(model, structure, widths)
        drop_caches(model)
        skip(model, structure.branches, None if widths is None else _first(structure, widths))
        yield
    finally:
        skip(model, structure.branches, None)
        for name, value in before.items():
            own[name].data = value
        set_sizes(model, structure, None)
