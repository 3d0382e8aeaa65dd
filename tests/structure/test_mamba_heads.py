"""Mamba-2 with several groups: heads of a group and members of a head are units, under norms of a group."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers as tr
from torch import Tensor, nn

from controlprune.plant.plant import Plant
from controlprune.structure.analyse import analyse
from controlprune.structure.groups import Structure

HEAD, HEADS, GROUPS = 8, 6, 2


@pytest.fixture(scope="module")
def traced() -> tuple[nn.Module, dict[str, Tensor], Structure]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_heads": HEADS, "head_dim": HEAD, "state_size": 5, "n_groups": GROUPS}
    config = tr.Mamba2Config(vocab_size=32, num_hidden_layers=1, expand=2, chunk_size=4, **sizes)
    model, x = tr.Mamba2ForCausalLM(config).eval(), {"input_ids": torch.randint(3, 32, (2, 8))}
    return model, x, analyse(model, x)


def test_groups_heads_and_members_are_units(traced: tuple[nn.Module, dict[str, Tensor], Structure]) -> None:
    mixer = [group for group in traced[2].groups if "mixer" in group.name]
    assert [group.size for group in mixer] == [GROUPS, HEADS // GROUPS, HEAD]
    (norm,) = [norm for norm in traced[2].norms if "mixer" in norm.module]
    assert norm.formula.groups == GROUPS


@pytest.mark.parametrize("off", ["members", "heads", "all kinds"])
def test_steps_masked_are_steps_shrunk(
    traced: tuple[nn.Module, dict[str, Tensor], Structure], off: str
) -> None:
    dense, x, structure = traced
    chosen = {"members": [HEAD], "heads": [HEADS // GROUPS], "all kinds": [GROUPS, HEADS // GROUPS, HEAD]}[
        off
    ]
    masks = [
        torch.arange(g.size) != 1
        if "mixer" in g.name and g.size in chosen
        else torch.ones(g.size, dtype=torch.bool)
        for g in structure.groups
    ]
    found = []
    for compact in (False, True):
        model = copy.deepcopy(dense)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
        plant = Plant(model, optimizer, structure)
        plant.apply(masks, compact=compact)
        outputs = [model(**x).logits.detach()]
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(**x).logits.flatten(0, 1), x["input_ids"].flatten()).backward()
            optimizer.step()
            outputs.append(model(**x).logits.detach())
        if compact and off == "members":
            assert model.backbone.layers[0].mixer.norm.group_size == HEADS // GROUPS * (HEAD - 1)
        plant.release()
        found.append((outputs, model.state_dict()))
    assert not torch.allclose(found[0][0][0], dense(**x).logits, atol=1e-6)
    for masked, shrunk in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(masked, shrunk, rtol=1e-4, atol=1e-6)
    for key, value in found[0][1].items():
        torch.testing.assert_close(value, found[1][1][key], rtol=1e-4, atol=1e-6, msg=key)
