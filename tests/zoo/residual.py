"""Transformers whose residual width is a group: masked and shrunk take the same training steps."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from controlprune.plant.plant import Plant
from controlprune.structure import Structure
from controlprune.structure.extents import Units

from .check import call
from .parts import Inputs

__all__ = ["FAMILIES", "FEW", "WIDTH", "apart_after", "residual_groups"]

WIDTH = 64  # of all of them, in the tables
FAMILIES = (
    *("bert", "roberta", "distilbert", "albert", "deberta_v2", "mpnet", "modernbert", "llama", "mistral"),
    *("qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi", "phi3", "olmo2", "stablelm", "gpt2", "gpt_neo"),
    *("gpt_neox", "gptj", "bloom", "falcon", "mpt", "starcoder2", "cohere", "granite", "hf_vit_msn"),
)
FEW = ("bert", "llama", "gpt2")


def residual_groups(structure: Structure) -> list[int]:
    """Groups of the residual width that norms take statistics over."""
    normed = {norm.extent.group for norm in structure.norms if isinstance(norm.extent, Units)}
    return [number for number in sorted(normed) if structure.groups[number].size == WIDTH]


def apart_after(steps: int, model: nn.Module, inputs: Inputs, structure: Structure) -> float:
    """Largest relative difference of a weight between so many steps masked and shrunk, without dropout."""
    model = copy.deepcopy(model).double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    example = tree_map(_double, inputs)
    random = torch.Generator().manual_seed(1)
    masks = [torch.randperm(n, generator=random) < max(n // 2, 1) for n in structure.sizes]
    masked, shrunk = (
        _stepped(copy.deepcopy(model), steps, example, structure, masks, compact) for compact in (False, True)
    )
    pairs = zip(masked.parameters(), shrunk.parameters(), strict=True)
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-9)) for a, b in pairs if a.numel())


def _stepped(
    model: nn.Module, steps: int, inputs: Inputs, structure: Structure, masks: list[Tensor], compact: bool
) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=0.01)
    plant = Plant(model, optimizer, structure)
    plant.apply(masks, compact=compact)
    for _ in range(steps):
        optimizer.zero_grad()
        losses = [y.square().mean() for y in call(model, inputs) if y.requires_grad]
        torch.stack(losses).sum().backward()
        optimizer.step()
    plant.release()
    return model


def _double(leaf: Tensor) -> Tensor:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
