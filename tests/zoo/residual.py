"""Transformers whose residual width is a group: masked and shrunk take the same training steps."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from controlprune.plant.plant import Plant
from controlprune.structure import Structure
from controlprune.structure.extents import groups_in

from .check import call
from .parts import Inputs

__all__ = ["FAMILIES", "FEW", "apart_after", "residual_groups"]

FAMILIES = (
    *("bert", "roberta", "distilbert", "albert", "deberta_v2", "mpnet", "modernbert", "electra", "xlm"),
    *(
        "esm",
        "fnet",
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3",
        "phi",
        "phi3",
        "olmo2",
    ),
    *("stablelm", "gpt2", "gpt_neo", "gpt_neox", "gptj", "gpt_bigcode", "opt", "biogpt", "bloom", "falcon"),
    *(
        "mpt",
        "starcoder2",
        "cohere",
        "granite",
        "mamba",
        "mamba2",
        "whisper",
        "hf_vit",
        "hf_deit",
        "hf_dinov2",
    ),
    *("hf_vit_msn", "hf_swin", "hf_convnext", "wav2vec2_stable", "data2vec_audio", "unispeech", "hubert"),
)
FEW = ("bert", "llama", "gpt2", "opt")
BROAD = 4  # of the slices of a residual width: every layer reads and writes it


class Undropped(TorchFunctionMode):
    """Nothing is dropped: what is drawn depends on the shape, which differs between the layouts."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if "dropout" in name:
            return args[0]
        if name == "scaled_dot_product_attention":
            args, kwargs["dropout_p"] = args[:4], 0.0
        return func(*args, **kwargs)


def residual_groups(structure: Structure) -> list[int]:
    """Groups that stand in many places and that norms take statistics over."""
    normed = {group for norm in structure.norms for group in groups_in(norm.extent)}
    return [number for number in sorted(normed) if len(structure.groups[number].slices) >= BROAD]


def apart_after(steps: int, model: nn.Module, inputs: Inputs, structure: Structure) -> float:
    """Largest difference of a weight between so many steps masked and shrunk, over how far it went."""
    model = copy.deepcopy(model).double().train()
    example = tree_map(_double, inputs)
    random = torch.Generator().manual_seed(1)
    masks = [
        torch.randperm(group.size, generator=random) < max(group.size // 2, group.least, 1)
        for group in structure.groups
    ]
    masked, shrunk = (
        _stepped(copy.deepcopy(model), steps, example, structure, masks, compact) for compact in (False, True)
    )
    ways = zip(model.parameters(), masked.parameters(), shrunk.parameters(), strict=True)
    return max(float((a - b).abs().max() / (a - w).abs().max().clamp_min(1e-9)) for w, a, b in ways)


def _stepped(
    model: nn.Module, steps: int, inputs: Inputs, structure: Structure, masks: list[Tensor], compact: bool
) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=0.01)
    plant = Plant(model, optimizer, structure)
    plant.apply(masks, compact=compact)
    for _ in range(steps):
        optimizer.zero_grad()
        with Undropped():
            losses = [y.square().mean() for y in call(model, inputs) if y.requires_grad]
        torch.stack(losses).sum().backward()
        optimizer.step()
    plant.release()
    return model


def _double(leaf: Tensor) -> Tensor:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
