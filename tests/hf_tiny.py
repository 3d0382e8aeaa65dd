"""Tiny transformers models of six families, made from configurations alone, with inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tr

TEXT = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}
GQA = dict(**TEXT, **SIZES, num_key_value_heads=4, max_position_embeddings=64)
IMAGE = {"image_size": 16, "patch_size": 4}


def llama() -> Any:
    return tr.LlamaForCausalLM(tr.LlamaConfig(**GQA, tie_word_embeddings=True))


def qwen2() -> Any:
    return tr.Qwen2ForCausalLM(tr.Qwen2Config(**GQA))


def qwen3() -> Any:
    return tr.Qwen3ForCausalLM(tr.Qwen3Config(**GQA, head_dim=8))


def gpt2() -> Any:
    return tr.GPT2LMHeadModel(tr.GPT2Config(**TEXT, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def bert() -> Any:
    return tr.BertForSequenceClassification(tr.BertConfig(**TEXT, **SIZES, max_position_embeddings=64))


def vit() -> Any:
    return tr.ViTForImageClassification(tr.ViTConfig(**SIZES, **IMAGE))


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": llama, "qwen2": qwen2, "qwen3": qwen3, "gpt2": gpt2, "bert": bert, "vit": vit,
}  # fmt: skip


def inputs(name: str, rows: int = 2) -> dict[str, torch.Tensor]:
    if name == "vit":
        return {"pixel_values": torch.randn(rows, 3, 16, 16)}
    ids = torch.randint(3, 64, (rows, 8))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
