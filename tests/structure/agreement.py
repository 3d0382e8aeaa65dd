"""Masked against shrunk, dumbly: two deep copies, one with zeros, one with index_select."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from controlprune.structure import Structure, set_sizes
from controlprune.structure.extents import groups_in, labels, size
from controlprune.structure.record import reference_kernels

__all__ = ["disagreement", "masked_copy", "random_masks", "run", "shrunk_copy", "worst"]

PATTERNS = 120  # width patterns tried of a model


def random_masks(structure: Structure, seed: int) -> list[Tensor]:
    """Each group keeps a random number of its units, one at least."""
    random = torch.Generator().manual_seed(seed)
    masks = []
    for n in structure.sizes:
        live = int(torch.randint(1, n + 1, (), generator=random))
        mask = torch.zeros(n, dtype=torch.bool)
        mask[torch.randperm(n, generator=random)[:live]] = True
        masks.append(mask)
    return masks


def _live(labels_of: Tensor, mask: Tensor) -> Tensor:
    return torch.tensor([label < 0 or bool(mask[label]) for label in labels_of.tolist()])


def masked_copy(model: nn.Module, structure: Structure, masks: Sequence[Tensor]) -> nn.Module:
    """Reader slices of dormant units are zero."""
    out = copy.deepcopy(model)
    tensors = {**dict(out.named_parameters()), **dict(out.named_buffers())}
    for number, group in enumerate(structure.groups):
        for part in group.readers:
            live = _live(labels(part.extent, number), masks[number])
            shape = [-1 if d == part.dim else 1 for d in range(tensors[part.tensor].dim())]
            tensors[part.tensor].data *= live.view(shape)
    for norm in structure.norms:
        live = torch.ones(size(norm.extent), dtype=torch.bool)
        for number in groups_in(norm.extent):
            live &= _live(labels(norm.extent, number), masks[number])
        _count_by_index(out.get_submodule(norm.module), norm.formula.axis, live.nonzero().flatten())
    for router in structure.routers:
        live = torch.ones(size(router.extent), dtype=torch.bool)
        for number in groups_in(router.extent):
            live &= _live(labels(router.extent, number), masks[number])
        _lose_by_index(out.get_submodule(router.module), live.nonzero().flatten())
    return out


def _lose_by_index(linear: nn.Module, index: Tensor) -> None:
    """The logits of the live units alone, put where they were; -inf elsewhere."""
    assert isinstance(linear, nn.Linear)
    weight, bias = linear.weight.data[index], None if linear.bias is None else linear.bias.data[index]

    def forward(x: Tensor) -> Tensor:
        y = nn.functional.linear(x, weight, bias)
        lost = torch.full((*x.shape[:-1], linear.out_features), -torch.inf, dtype=y.dtype)
        return lost.index_copy(-1, index, y)

    linear.forward = forward  # type: ignore[method-assign]


def _count_by_index(norm: nn.Module, axis: int, index: Tensor) -> None:
    """The norm of the live channels alone, put where they were; nothing elsewhere."""
    small = copy.deepcopy(norm)
    for parameter in small.parameters():
        parameter.data = parameter.data.flatten()[index].view([-1 if n > 1 else 1 for n in parameter.shape])
    if isinstance(small, (nn.LayerNorm, nn.RMSNorm)):
        small.normalized_shape = (len(index),)
    if isinstance(small, nn.GroupNorm):
        members = small.num_channels // small.num_groups
        small.num_groups, small.num_channels = len((index // members).unique()), len(index)

    def forward(x: Tensor) -> Tensor:
        y = small(x.index_select(axis, index))
        return torch.zeros(x.shape, dtype=y.dtype).index_copy(axis % x.dim(), index, y)

    norm.forward = forward  # type: ignore[method-assign]


def shrunk_copy(model: nn.Module, structure: Structure, masks: Sequence[Tensor]) -> nn.Module:
    """Only the live units are there."""
    out = copy.deepcopy(model)
    for name, tensor in (*out.named_parameters(), *out.named_buffers()):
        data = tensor.data
        for dim, extent in enumerate(structure.tensors[name]):
            keep = torch.ones(tensor.shape[dim], dtype=torch.bool)
            for number in groups_in(extent):
                keep &= _live(labels(extent, number), masks[number])
            data = data.index_select(dim, keep.nonzero().flatten())
        tensor.data = data
    set_sizes(out, structure, [int(mask.sum()) for mask in masks])
    return out


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    """In plain operators: the fused encoder layer of torch's goes past its parts."""
    torch.manual_seed(7)
    with torch.no_grad(), reference_kernels(model):
        out = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    return [leaf for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, Tensor)]


def disagreement(model: nn.Module, inputs: Any, structure: Structure, seed: int = 0) -> float:
    """Largest relative difference of masked and shrunk outputs in float64-free arithmetic of the model."""
    masks = random_masks(structure, seed)
    worst = 0.0
    for masked, shrunk in zip(
        run(masked_copy(model, structure, masks), inputs),
        run(shrunk_copy(model, structure, masks), inputs),
        strict=True,
    ):
        assert masked.shape == shrunk.shape
        if masked.is_floating_point() or masked.is_complex():
            gap = (masked - shrunk).abs().max() / masked.abs().max().clamp_min(1e-12)
            worst = max(worst, float(gap))
    return worst


def worst(model: nn.Module, x: Tensor, structure: Structure) -> float:
    """Largest difference of masked and shrunk outputs over all width patterns, or many of them."""
    rungs = [range(group.multiple, group.size + 1, group.multiple) for group in structure.groups]
    patterns = list(itertools.product(*rungs))
    random = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(patterns), generator=random)[:PATTERNS].tolist()
    lone = [
        tuple(width if g == group else n for g, n in enumerate(structure.sizes))
        for group, widths in enumerate(rungs)
        for width in widths
    ]
    gap = 0.0
    for widths in [*(patterns[k] for k in chosen), *lone] if structure.groups else []:
        masks = [torch.arange(n) < k for n, k in zip(structure.sizes, widths, strict=True)]
        masked, shrunk = (
            run(layout(model, structure, masks), (x,))[0] for layout in (masked_copy, shrunk_copy)
        )
        gap = max(gap, float((masked - shrunk).abs().max() / masked.abs().max()))
    return gap
