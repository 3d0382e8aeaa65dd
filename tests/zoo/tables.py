"""All the tables of the zoo by name; those whose library is not installed are empty."""

from __future__ import annotations

import importlib.util

from .libraries import TIMM, TORCHVISION
from .parts import Factory
from .plain_cnn import CNN
from .plain_cnn2 import CNN2
from .plain_vit import VIT

__all__ = ["FAST", "TRAINED", "tables"]

FAST = (  # one of each kind, for the default run
    *("vgg", "resnet_bottleneck", "densenet", "shufflenet_v1", "mobilenet_v3", "convnext", "unet"),
    *("vit", "swin", "torch_encoder", "llama", "mixtral", "gpt2", "t5", "gcn"),
)

TRAINED = (  # one of each kind that trains in a second
    *("lenet", "vgg", "resnet_bottleneck", "shufflenet_v1", "mobilenet_v2", "efficientnet", "convnext"),
    *("res2net", "vit", "xcit", "mixer", "levit", "coatnet", "torch_encoder", "hybridstem"),
    *("distilbert", "albert", "fnet", "llama", "gemma2", "phi3", "gpt2", "opt", "bloom"),
    *("t5", "bart", "mamba2", "hf_levit", "hf_efficientnet", "gcn"),
)


def tables() -> dict[str, dict[str, Factory]]:
    """Table name -> (model name -> factory)."""
    found = {"cnn": CNN | CNN2, "vit": VIT}
    if importlib.util.find_spec("transformers"):
        from . import hf_more, hf_other, hf_senses, hf_text

        found["hf_text"] = hf_text.ENCODERS | hf_text.DECODERS | hf_text.SEQ2SEQ
        found["hf_moe_ssm"] = hf_text.MIXTURES | hf_text.STATE_SPACE
        found["hf_senses"] = hf_senses.VISION | hf_senses.SPEECH_AND_PAIRS
        found["hf_more"] = hf_more.MORE | hf_other.OTHER
    if importlib.util.find_spec("torch_geometric"):
        from .graph import GRAPH
        from .graph_more import GRAPH_MORE

        found["graph"] = GRAPH | GRAPH_MORE
    return found | {"torchvision": TORCHVISION, "timm": TIMM}
