"""LoRA adapters on a frozen base (peft): the base is cut with them, merged into it, and stays what it was."""

from __future__ import annotations

import pytest
import torch
import transformers as tr
from torch import Tensor

import controlprune as cp

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks it

CONFIG = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}


def _ids(rows: int, seed: int) -> Tensor:
    return torch.randint(3, 64, (rows, 8), generator=torch.Generator().manual_seed(seed))


def test_adapters_train_while_the_frozen_base_shrinks_and_then_merge() -> None:
    torch.manual_seed(0)
    base = tr.BertForSequenceClassification(tr.BertConfig(**CONFIG, num_hidden_layers=2))
    targets = ["query", "value", "intermediate.dense", "output.dense"]
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=targets))
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller = cp.attach(
        model,
        optimizer,
        budget=cp.Budget(flops=0.7),
        example_inputs={"input_ids": _ids(4, 0)},
        total_steps=30,
    )
    for step in range(30):
        ids = _ids(16, step)
        loss = model(input_ids=ids, labels=ids[:, 0] % 2).loss
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
    masks = controller.masks
    small = controller.finalize().eval()
    assert controller.cost()["flops"].fraction <= 0.7 * (1 + 1e-9)
    assert any(not mask.all() for mask in masks.values())
    for name, p in small.named_parameters():
        if not p.requires_grad and p.shape == frozen[name].shape:
            torch.testing.assert_close(p.detach(), frozen[name], rtol=0, atol=0)  # training left it alone
    with torch.no_grad():
        before = small(input_ids=_ids(4, 99)).logits
        merged = small.merge_and_unload().eval()
        torch.testing.assert_close(merged(input_ids=_ids(4, 99)).logits, before)
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_adapters_on_a_small_model_train_it_alone() -> None:
    torch.manual_seed(0)
    model = tr.BertForSequenceClassification(tr.BertConfig(**CONFIG, num_hidden_layers=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    controller = cp.attach(
        model,
        optimizer,
        budget=cp.Budget(flops=0.5),
        example_inputs={"input_ids": _ids(4, 0)},
        total_steps=10,
    )
    for step in range(10):
        loss = model(input_ids=_ids(8, step), labels=torch.arange(8) % 2).loss
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
    adapted = peft.get_peft_model(
        controller.finalize(), peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    )
    kept = {n: p.detach().clone() for n, p in adapted.named_parameters() if not p.requires_grad}
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-1)
    adapted(input_ids=_ids(8, 0), labels=torch.arange(8) % 2).loss.backward()
    optimizer.step()
    for name, p in adapted.named_parameters():
        if not p.requires_grad:
            torch.testing.assert_close(p.detach(), kept[name], rtol=0, atol=0)
