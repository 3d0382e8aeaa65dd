"""Rotary angles that transformers makes anew, for all columns, once an input is long."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from controlprune.structure import analyse


def test_columns_stay_where_angles_are_made_anew_for_long_inputs() -> None:
    config = LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=16
    )
    config.max_position_embeddings = 8
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    structure = analyse(LlamaForCausalLM(config), torch.randint(16, (1, 6)), head_dim=True)
    assert not any(group.met for group in structure.groups)
    assert any("rope_type" in refusal.reason for refusal in structure.refused)
