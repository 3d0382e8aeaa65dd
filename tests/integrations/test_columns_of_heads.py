"""granularity="channel+head_dim" on models of transformers: masked is shrunk, in training, in files and back.

The scale of attention is a number that each of these attentions keeps (`self.scaling`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_tiny import FAMILIES, inputs
from torch import Tensor

import controlprune as cp

OFF = {
    "bert": 2,
    "gpt2": 2,
    "vit": 2,
    "llama": 1,
    "qwen2": 1,
}  # groups: a layer each; rotary ones share angles
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1, eps=1e-3),
}


def attached(name: str, optimizer: str = "sgd") -> tuple[Any, dict[str, Tensor], cp.Controller, Any]:
    torch.manual_seed(0)
    model, x = FAMILIES[name]().eval(), inputs(name)
    stepper = OPTIMIZERS[optimizer](model.parameters())
    train(model, stepper, x)
    controller = cp.attach(
        model,
        stepper,
        budget=cp.Budget(flops=0.7),
        example_inputs=x,
        total_steps=20,
        granularity="channel+head_dim",
    )
    met = [group for group in controller.groups if group.met]
    assert len(met) == OFF[name], controller.report()
    return model, x, controller, stepper


def train(model: Any, stepper: Any, x: dict[str, Tensor]) -> None:
    stepper.zero_grad()
    logits = model(**x).logits
    F.cross_entropy(logits.flatten(0, -2), logits.detach().flatten(0, -2).roll(1, -1).argmax(-1)).backward()
    stepper.step()


def first_column_off(controller: cp.Controller) -> dict[str, Tensor]:
    """The first of each group, so that what is left is not what a narrower class would make."""
    return {g.name: torch.arange(g.size) > 0 for g in controller.groups if g.met}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", OFF)
def test_masked_steps_are_shrunk_steps(name: str, optimizer: str) -> None:
    found = []
    for compact in (False, True):
        model, x, controller, stepper = attached(name, optimizer)
        dense = model(**x).logits.detach()
        controller.set_masks(first_column_off(controller))
        if compact:
            controller.shrink()
        outputs = [model(**x).logits.detach()]
        assert not torch.allclose(outputs[0], dense, atol=1e-6)
        for _ in range(3):
            train(model, stepper, x)
            outputs.append(model(**x).logits.detach())
        controller.detach()
        found.append((outputs, {k: v.clone() for k, v in model.state_dict().items()}))
    for masked, shrunk in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(masked, shrunk, rtol=1e-4, atol=1e-6)
    for key, value in found[0][1].items():
        torch.testing.assert_close(value, found[1][1][key], rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", OFF)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    """Angles of rotary embeddings are in no state dict: the record says which are left."""
    model, x, controller, _ = attached(name)
    kind = type(model)
    controller.set_masks(first_column_off(controller))
    controller.shrink()
    expected = model(**x).logits
    cp.save_pretrained(controller, tmp_path / "folder")
    cp.save(controller, tmp_path / "file")
    again = cp.from_pretrained(tmp_path / "folder", kind).eval()
    assert type(again) is kind
    torch.testing.assert_close(again(**x).logits, expected, rtol=1e-5, atol=1e-6)
    loaded = cp.load(tmp_path / "file", FAMILIES[name]().eval())
    torch.testing.assert_close(loaded(**x).logits, expected, rtol=1e-5, atol=1e-6)


def test_a_model_that_is_pruned_twice_remembers_both(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = FAMILIES["llama"]().config
    config.head_dim = 12  # six pairs
    model, x = type(FAMILIES["llama"]())(config).eval(), inputs("llama")
    for gone in (2, 1):
        controller = cp.attach(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            budget=cp.Budget(flops=0.7),
            example_inputs=x,
            total_steps=20,
            granularity="channel+head_dim",
        )
        (group,) = [group for group in controller.groups if group.met]
        controller.set_masks({group.name: torch.arange(group.size) != gone})
        model = controller.finalize()  # down to its budget
        cp.save_pretrained(controller, tmp_path)
    again = cp.from_pretrained(tmp_path, type(model)).eval()
    assert torch.equal(again.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    torch.testing.assert_close(again(**x).logits, model(**x).logits, rtol=1e-5, atol=1e-6)
