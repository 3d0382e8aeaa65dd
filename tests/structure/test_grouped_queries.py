"""Grouped queries in transformers: what one kernel repeats itself, another reads off the module."""

from __future__ import annotations

import pytest
import torch
from hf_tiny import FAMILIES, inputs

import controlprune as cp


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_a_net_traced_without_padding_runs_with_it_when_query_heads_are_gone(name: str) -> None:
    model, x = FAMILIES[name]().eval(), inputs(name)
    optimizer = torch.optim.AdamW(model.parameters())
    controller = cp.attach(model, optimizer, budget=cp.Budget(flops=0.8), example_inputs=x, total_steps=5)
    members = {g.name: torch.tensor([True, False]) for g in controller.groups if g.kind == "head member"}
    assert len(members) == 2
    controller.set_masks(members)
    padded = {**x, "attention_mask": x["attention_mask"].clone()}
    padded["attention_mask"][0, :3] = 0
    with torch.no_grad():
        expected = model(**padded).logits
        controller.shrink()
        torch.testing.assert_close(model(**padded).logits, expected)
