"""A pruned model in a folder, with real transformers: classes, Auto classes, tied weights, pruned twice."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from hf_tiny import FAMILIES, inputs
from safetensors import safe_open
from torch import nn

import controlprune as cp
from controlprune.integrations.hub import PrunedModelHubMixin

AUTO = {
    "llama": tr.AutoModelForCausalLM, "qwen2": tr.AutoModelForCausalLM, "qwen3": tr.AutoModelForCausalLM,
    "gpt2": tr.AutoModelForCausalLM, "bert": tr.AutoModelForSequenceClassification,
    "vit": tr.AutoModelForImageClassification,
}  # fmt: skip


HEADS = {"q_proj", "query", "c_attn"}


def attached(model: nn.Module, x: dict[str, torch.Tensor], share: float = 0.7) -> cp.Controller:
    model.eval()  # no dropout: outputs are compared
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return cp.attach(model, optimizer, budget=cp.Budget(flops=share), example_inputs=x, total_steps=10)


def uneven(controller: cp.Controller, seed: int = 0) -> None:
    """Off: a third of the units of every second group, a different set in each."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for group in controller.groups[seed % 2 :: 2]:
        mask = torch.ones(group.size, dtype=torch.bool)
        mask[torch.randperm(group.size, generator=generator)[: max(1, group.size // 3)]] = False
        masks[group.name] = mask if group.size > 1 else ~mask
    controller.set_masks(masks)


def logits(model: Any, x: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**x).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_saved_and_read_back_by_its_class_and_its_auto_class(name: str, tmp_path: Path) -> None:
    model, x = FAMILIES[name](), inputs(name)
    controller = attached(model, x)
    uneven(controller)
    expected = logits(model, x)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    cp.save_pretrained(controller, tmp_path / "during")
    after = model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert not hasattr(model.config, "controlprune")  # the run goes on undisturbed

    for model_class in (type(model), AUTO[name]):
        small = cp.from_pretrained(tmp_path / "during", model_class)
        assert type(small) is type(model)
        torch.testing.assert_close(logits(small, x), expected)
    small = cp.from_pretrained(tmp_path / "during", type(model), dtype=torch.bfloat16)
    assert small.dtype == torch.bfloat16

    finalized = controller.finalize()
    cp.save_pretrained(controller, tmp_path / "after")
    again = cp.from_pretrained(tmp_path / "after", type(model))
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in finalized.state_dict().items()
    }
    torch.testing.assert_close(logits(again, x), logits(finalized, x))


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_own_words_say_the_widths_layer_by_layer(name: str, tmp_path: Path) -> None:
    model, x = FAMILIES[name](), inputs(name)
    controller = attached(model, x)
    uneven(controller)
    cp.save_pretrained(controller, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    up = "n_inner" if name == "gpt2" else "intermediate_size"
    dense = 128 if name == "gpt2" else 64
    found = {layer.get(up, dense) for layer in saved["per_layer_config"].values()}
    small = cp.from_pretrained(tmp_path, type(model))
    masks = controller.masks
    mlp = [m for k, m in masks.items() if ".mlp." in k or "intermediate" in k]
    assert min(found) == min(int(m.sum()) for m in mlp)
    heads = "num_attention_heads" if name in ("gpt2", "bert", "vit") else "num_key_value_heads"
    expected = [int(m.sum()) for k, m in masks.items() if k.rpartition(".")[2] in HEADS]
    assert [getattr(layer, heads) for layer in small.config.per_layer_config] == expected


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_text_is_generated_with_every_cache(name: str, cache: str, tmp_path: Path) -> None:
    model, x = FAMILIES[name](), inputs(name)
    controller = attached(model, x)
    uneven(controller)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(**x, **settings)
    cp.save_pretrained(controller, tmp_path)
    small = cp.from_pretrained(tmp_path, type(model)).eval()
    assert torch.equal(small.generate(**x, **settings, cache_implementation=cache), expected)


def test_tied_weights_are_saved_once_and_tied_again(tmp_path: Path) -> None:
    model, x = FAMILIES["llama"](), inputs("llama")
    controller = attached(model, x)
    uneven(controller)
    cp.save_pretrained(controller, tmp_path)
    with safe_open(str(tmp_path / "model.safetensors"), framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    small = cp.from_pretrained(tmp_path, tr.LlamaForCausalLM)
    assert small.lm_head.weight is small.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_pruned_twice(name: str, tmp_path: Path) -> None:
    """Once more after loading, and once more on the very object that was finalized."""
    model, x = FAMILIES[name](), inputs(name)
    first = attached(model, x, 0.8)
    uneven(first)
    first.finalize()
    cp.save_pretrained(first, tmp_path / "once")
    loaded = cp.from_pretrained(tmp_path / "once", type(model))
    for number, small in enumerate((loaded, model)):
        second = attached(small, x, 0.7)
        uneven(second, seed=1)
        second.finalize()
        cp.save_pretrained(second, tmp_path / f"twice{number}")
        again = cp.from_pretrained(tmp_path / f"twice{number}", type(model))
        torch.testing.assert_close(logits(again, x), logits(small, x))


def test_a_plain_save_warns_names_the_call_and_can_be_read(tmp_path: Path) -> None:
    model, x = FAMILIES["bert"](), inputs("bert")
    controller = attached(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "dense")  # nothing is shrunk yet
    uneven(controller)
    controller.shrink()
    with pytest.warns(UserWarning, match=r"controlprune\.from_pretrained\(folder, BertForSequence"):
        model.save_pretrained(tmp_path / "during")
    assert not hasattr(model.config, "controlprune")
    small = controller.finalize()
    with pytest.warns(UserWarning, match=r"controlprune\.save_pretrained\(controller, folder\)"):
        small.save_pretrained(tmp_path / "after")
    for folder in ("during", "after"):
        assert cp.from_pretrained(tmp_path / folder, type(model)).num_parameters() < 40_000
    torch.testing.assert_close(
        logits(cp.from_pretrained(tmp_path / "after", type(model)), x), logits(small, x)
    )


def test_copies_and_pickles_of_a_small_model_still_save(tmp_path: Path) -> None:
    model, x = FAMILIES["bert"](), inputs("bert")
    controller = attached(model, x)
    uneven(controller)
    small = controller.finalize()
    other = copy.deepcopy(small)
    assert other.save_pretrained.model is other  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match="save_pretrained"):
        other.save_pretrained(tmp_path / "copy")
    pickled = pickle.loads(pickle.dumps(small))
    torch.testing.assert_close(logits(pickled, x), logits(small, x))


def test_detach_leaves_the_model_as_it_was() -> None:
    model, x = FAMILIES["bert"](), inputs("bert")
    before = dict(vars(model))
    controller = attached(model, x)
    controller.detach()
    assert vars(model).keys() == before.keys()
    assert not hasattr(model.config, "controlprune")


def test_a_folder_of_another_class_or_kind_is_refused(tmp_path: Path) -> None:
    plain = FAMILIES["bert"]()
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="not saved by controlprune"):
        cp.from_pretrained(tmp_path / "plain", type(plain))
    controller = attached(plain, inputs("bert"))
    uneven(controller)
    cp.save_pretrained(controller, tmp_path / "small")
    with pytest.raises(ValueError, match="another model"):
        cp.from_pretrained(tmp_path / "small", tr.BertModel)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    config["controlprune"]["shapes"]["bert.pooler.dense.weight"] = [10**6, 32]
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="another model or damaged"):
        cp.from_pretrained(tmp_path / "small", type(plain))


def test_a_model_without_the_method_is_told_what_to_do(tmp_path: Path) -> None:
    controller = attached(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.randn(2, 4),))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="PrunedModelHubMixin"):
        cp.save_pretrained(controller, tmp_path)
    assert not list(tmp_path.iterdir())


class Net(nn.Module, PrunedModelHubMixin):
    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def test_any_module_through_the_mixin_also_twice(tmp_path: Path) -> None:
    net, x = Net(width=20), torch.randn(3, 8)
    controller = attached(net, (x,))  # type: ignore[arg-type]
    uneven(controller)
    expected = net(x).detach()
    cp.save_pretrained(controller, tmp_path / "during")
    torch.testing.assert_close(Net.from_pretrained(tmp_path / "during")(x), expected)
    controller.finalize()
    cp.save_pretrained(controller, tmp_path / "once")
    loaded = cp.from_pretrained(tmp_path / "once", Net)
    assert loaded.body[0].out_features < 20
    second = attached(loaded, (x,), 0.6)  # type: ignore[arg-type]
    uneven(second, seed=1)
    second.finalize()
    cp.save_pretrained(second, tmp_path / "twice")
    torch.testing.assert_close(Net.from_pretrained(tmp_path / "twice")(x), loaded(x))


def test_a_dense_model_of_the_mixin_is_as_ever(tmp_path: Path) -> None:
    net, x = Net(width=20), torch.randn(3, 8)
    net.save_pretrained(tmp_path)
    torch.testing.assert_close(Net.from_pretrained(tmp_path)(x), net(x))
