"""A pruned model in a folder, as the Hugging Face hub keeps models: config.json and safetensors.

    save_pretrained(controller, "small")                     during a run or after it
    model = from_pretrained("small", LlamaForCausalLM)       or an Auto class; a plain model of that class

    config.json   controlprune       every width that is not the class's own (state/widths.py)
                  per_layer_config   in transformers' words what its caches read: heads with keys of their
                                     own, size of the MLP, by layer (Llama, Qwen, BERT, ViT, GPT-2 alike)

transformers (5.24) saves `per_layer_config` and does not read it when it builds Llama, BERT, GPT-2 or ViT,
and has no word for other widths. The patch is one method: the class is built from its dense configuration,
made as small as the record says, and filled by transformers' own loader, so whatever the class's
`from_pretrained` takes works here (dtype, device_map, …). Any other module: integrations/hub.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..loop.controller import Controller
from ..loop.export import whole_plant
from ..plant.copies import small_copy
from ..state.saver import KEY, carrier, present_record
from ..state.widths import narrow, pick
from ..structure.skipping import Removed

__all__ = ["from_pretrained", "save_pretrained"]


@dataclass(frozen=True)
class Names:
    """What transformers calls the parts of a layer; `fused`: queries, keys and values are one tensor."""

    layers: str
    key: str
    up: str
    intermediate: str = "intermediate_size"
    fused: bool = False  # and, as GPT-2's layers do, the weight has its outputs last


GATED = Names("layers", "self_attn.k_proj", "mlp.up_proj")
BERT = Names("encoder.layer", "attention.self.key", "intermediate.dense")
FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"), GATED),
    **dict.fromkeys(("bert", "roberta"), BERT),
    "vit": Names("layers", "attention.k_proj", "mlp.fc1"),
    "gpt2": Names("h", "attn.c_attn", "mlp.c_fc", "n_inner", fused=True),
}


def save_pretrained(controller: Controller, folder: str | Path) -> None:
    """The small model of this moment into `folder`; a run goes on undisturbed."""
    plant = whole_plant(controller)
    model: Any = plant.model
    if not callable(getattr(type(model), "save_pretrained", None)):
        raise TypeError(
            f"controller: {type(model).__name__} has no save_pretrained; let it inherit "
            "controlprune.integrations.hub.PrunedModelHubMixin, or use controlprune.save"
        )
    small: Any = small_copy(plant)
    setattr(carrier(small), KEY, present_record(plant))
    _layer_by_layer(small)
    type(small).save_pretrained(small, folder)


def from_pretrained(folder: str | Path, model_class: type, **options: Any) -> Any:
    """The model of that folder, plain; `options`: what `model_class.from_pretrained` takes."""
    if not hasattr(model_class, "_from_config") and not hasattr(model_class, "_model_mapping"):
        return model_class.from_pretrained(folder, **options)  # type: ignore[attr-defined]
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    if not isinstance(getattr(config, KEY, None), Mapping):
        raise ValueError(f"folder={str(folder)!r}: it was not saved by controlprune.save_pretrained")
    concrete: Any = _concrete(model_class, config)
    small: Any = type(concrete.__name__, (_Narrowed, concrete), {"__module__": concrete.__module__})
    model = small.from_pretrained(folder, config=config, **options)
    model.__class__ = concrete
    return model


class _Narrowed:
    """Built dense, then made as small as its configuration says."""

    def __init__(self, config: Any, *args: Any, **options: Any) -> None:
        layers = vars(config).pop("_heterogeneity_spec", None)
        super().__init__(config, *args, **options)  # type: ignore[call-arg]
        narrow(self, getattr(config, KEY))  # type: ignore[arg-type]
        if layers is not None:
            config._heterogeneity_spec = layers

    def initialize_weights(self, *args: Any, **options: Any) -> None:
        """Buffers that are in no file are filled by the class, dense, and cut again."""
        model: Any = self
        cut: Mapping[str, Any] = getattr(model.config, KEY).get("picked", {})
        for name, positions in cut.items():
            _put(model, name, model.get_buffer(name).new_empty([n for n, _ in positions]))
        super().initialize_weights(*args, **options)  # type: ignore[misc]
        for name, positions in cut.items():
            _put(model, name, pick(model.get_buffer(name), positions))


def _put(model: nn.Module, name: str, buffer: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._buffers[leaf] = buffer


def _concrete(model_class: Any, config: Any) -> type:
    """The class itself, or what an Auto class makes of the configuration."""
    mapping = getattr(model_class, "_model_mapping", None)
    if mapping is None:
        return model_class
    found = mapping[type(config)]
    return found[0] if isinstance(found, (tuple, list)) else found


def _layer_by_layer(model: Any) -> None:
    """`config.per_layer_config` says the widths too, where this transformers and this family know it."""
    config = getattr(model, "config", None)
    names = FAMILIES.get(getattr(config, "model_type", ""))
    if config is None or names is None or not hasattr(type(config), "per_layer_config"):
        return
    config.per_layer_config = None
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = model.base_model.get_submodule(names.layers)
    heads = "num_key_value_heads" if hasattr(config, "num_key_value_heads") else "num_attention_heads"
    widths = {}
    for i, layer in enumerate(layers):
        own = _head_dim(layer, names, size)
        keys = _outputs(layer, names.key, names) // (3 if names.fused else 1) // own
        widths[i] = {heads: keys, names.intermediate: _outputs(layer, names.up, names)}
    config.head_dim, config.per_layer_config = size, widths


def _head_dim(layer: nn.Module, names: Names, dense: int) -> int:
    """As the attention says (granularity="channel+head_dim" may have cut it)."""
    modules, attention = dict(layer.named_modules()), names.key.rpartition(".")[0]
    owner = modules.get(attention)  # None: what it stood in was removed
    found = (getattr(owner, name, None) for name in ("head_dim", "attention_head_size"))
    return next((n for n in found if isinstance(n, int)), dense)


def _outputs(layer: nn.Module, name: str, names: Names) -> int:
    """0 where it was removed, or what it stood in."""
    part: Any = layer
    for step in name.split("."):
        if isinstance(part, Removed):
            break
        part = getattr(part, step)
    return 0 if isinstance(part, Removed) else part.weight.shape[1 if names.fused else 0]
