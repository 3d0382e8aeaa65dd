"""Vision, speech and contrastive models of transformers: tiny configurations, random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers as t
from torch import Tensor, nn

from .hf_text import BART, SIZES, SPECIAL, VOCABULARY, tokens
from .parts import Factory

VIT = {**SIZES, "image_size": 32, "patch_size": 8}


def pixels(size: int = 32, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def _vision(model: str, config: type[t.PreTrainedConfig], size: int = 32, **settings: Any) -> Factory:
    """The class called `model` on `size`-pixel images, five classes."""

    def build() -> tuple[nn.Module, dict[str, Tensor]]:
        return getattr(t, model)(config(num_labels=5, **settings)), {"pixel_values": pixels(size)}

    return build


VISION: dict[str, Factory] = {
    "hf_vit": _vision("ViTForImageClassification", t.ViTConfig, **VIT),
    "hf_deit": _vision("DeiTForImageClassificationWithTeacher", t.DeiTConfig, **VIT),
    "hf_beit": _vision(
        "BeitForImageClassification",
        t.BeitConfig,
        **VIT,
        use_relative_position_bias=True,
        layer_scale_init_value=0.1,
    ),
    "hf_dinov2": _vision("Dinov2ForImageClassification", t.Dinov2Config, **VIT),
    "hf_dinov2_swiglu": _vision("Dinov2ForImageClassification", t.Dinov2Config, **VIT, use_swiglu_ffn=True),
    "hf_swin": _vision(
        "SwinForImageClassification",
        t.SwinConfig,
        image_size=32,
        patch_size=2,
        embed_dim=32,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    "hf_swinv2": _vision(
        "Swinv2ForImageClassification",
        t.Swinv2Config,
        image_size=32,
        patch_size=2,
        embed_dim=32,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    "hf_convnext": _vision(
        "ConvNextForImageClassification", t.ConvNextConfig, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1]
    ),
    "hf_convnextv2": _vision(
        "ConvNextV2ForImageClassification",
        t.ConvNextV2Config,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
    ),
    "hf_resnet": _vision(
        "ResNetForImageClassification",
        t.ResNetConfig,
        embedding_size=16,
        hidden_sizes=[32, 64],
        depths=[1, 2],
    ),
    "hf_regnet": _vision(
        "RegNetForImageClassification",
        t.RegNetConfig,
        embedding_size=16,
        hidden_sizes=[32, 64],
        depths=[1, 2],
        groups_width=16,
    ),
    "hf_mobilenet_v1": _vision(
        "MobileNetV1ForImageClassification", t.MobileNetV1Config, image_size=32, depth_multiplier=0.25
    ),
    "hf_mobilenet_v2": _vision(
        "MobileNetV2ForImageClassification", t.MobileNetV2Config, image_size=32, depth_multiplier=0.25
    ),
    "hf_mobilevit": _vision(
        "MobileViTForImageClassification",
        t.MobileViTConfig,
        64,
        image_size=64,
        hidden_sizes=[32, 48, 64],
        neck_hidden_sizes=[8, 16, 24, 32, 40, 48, 64],
        num_attention_heads=4,
    ),
    "hf_segformer": _vision(
        "SegformerForSemanticSegmentation",
        t.SegformerConfig,
        64,
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=32,
    ),
    "hf_poolformer": _vision(
        "PoolFormerForImageClassification",
        t.PoolFormerConfig,
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 32, 48, 64],
    ),
    "hf_levit": _vision(
        "LevitForImageClassification",
        t.LevitConfig,
        64,
        image_size=64,
        hidden_sizes=[32, 48, 64],
        num_attention_heads=[2, 3, 4],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
        patch_size=16,
        down_ops=[["Subsample", 8, 4, 4, 2, 2], ["Subsample", 8, 6, 4, 2, 2]],
    ),
    "hf_efficientnet": _vision(
        "EfficientNetForImageClassification",
        t.EfficientNetConfig,
        image_size=32,
        width_coefficient=0.25,
        depth_coefficient=0.3,
        hidden_dim=320,
    ),
    "hf_cvt": _vision(
        "CvtForImageClassification",
        t.CvtConfig,
        embed_dim=[16, 32, 48],
        num_heads=[1, 2, 3],
        depth=[1, 2, 3],
    ),
    "hf_pvt": _vision(
        "PvtForImageClassification",
        t.PvtConfig,
        64,
        image_size=64,
        num_encoder_blocks=4,
        depths=[1, 1, 1, 1],
        sequence_reduction_ratios=[8, 4, 2, 1],
        hidden_sizes=[16, 32, 40, 48],
        num_attention_heads=[1, 2, 5, 6],
        mlp_ratios=[4, 4, 2, 2],
    ),
    "hf_focalnet": _vision(
        "FocalNetForImageClassification",
        t.FocalNetConfig,
        image_size=32,
        embed_dim=32,
        depths=[1, 1],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
    ),
    "hf_vit_mae": _vision(
        "ViTMAEForPreTraining",
        t.ViTMAEConfig,
        **VIT,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=64,
        mask_ratio=0.5,
    ),
    "hf_bit": _vision(
        "BitForImageClassification",
        t.BitConfig,
        64,
        embedding_size=32,
        hidden_sizes=[64, 128],
        depths=[1, 2],
        num_groups=8,
    ),
    "hf_yolos": _vision(
        "YolosForObjectDetection", t.YolosConfig, **{**VIT, "image_size": [32, 32]}, num_detection_tokens=4
    ),
    "hf_vitdet": _vision(
        "VitDetModel",
        t.VitDetConfig,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    ),
}


def _siglip() -> tuple[nn.Module, dict[str, Tensor]]:
    text = {
        **SIZES,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 16,
        "projection_size": 64,
        **SPECIAL,
    }
    model = t.SiglipModel(t.SiglipConfig(text_config=text, vision_config=VIT))
    return model, {"input_ids": tokens(), "pixel_values": pixels()}


def _clip() -> tuple[nn.Module, dict[str, Tensor]]:
    text = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 16, **SPECIAL}
    model = t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=VIT, projection_dim=32))
    return model, {"input_ids": tokens(), "pixel_values": pixels()}


def _llava() -> tuple[nn.Module, dict[str, Tensor]]:
    text = t.LlamaConfig(**SIZES, vocab_size=VOCABULARY, num_key_value_heads=2)
    model = t.LlavaForConditionalGeneration(
        t.LlavaConfig(
            vision_config=t.CLIPVisionConfig(**VIT),
            text_config=text,
            image_token_index=2,
            image_seq_length=16,
        )
    )
    ids = torch.cat([torch.full((2, 16), 2), tokens()], 1)
    return model, {"input_ids": ids, "pixel_values": pixels()}


SPEECH = {
    **SIZES,
    "conv_dim": [32, 32, 32],
    "conv_kernel": [10, 3, 3],
    "conv_stride": [5, 2, 2],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 16,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
}


def _sound(model: str, config: type[t.PreTrainedConfig], **settings: Any) -> Factory:
    def build() -> tuple[nn.Module, dict[str, Tensor]]:
        wave = torch.randn(2, 1000, generator=torch.Generator().manual_seed(1))
        return getattr(t, model)(config(**SPEECH, **settings)), {"input_values": wave}

    return build


def _whisper() -> tuple[nn.Module, dict[str, Tensor]]:
    config = t.WhisperConfig(
        **{k: v for k, v in BART.items() if k != "max_position_embeddings"},
        vocab_size=VOCABULARY,
        num_mel_bins=16,
        max_source_positions=16,
        max_target_positions=16,
        decoder_start_token_id=1,
        **SPECIAL,
    )
    mel = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
    return t.WhisperForConditionalGeneration(config), {"input_features": mel, "decoder_input_ids": tokens(7)}


SPEECH_AND_PAIRS: dict[str, Factory] = {
    "whisper": _whisper,
    "wav2vec2": _sound("Wav2Vec2ForCTC", t.Wav2Vec2Config),
    "wav2vec2_stable": _sound(
        "Wav2Vec2ForCTC", t.Wav2Vec2Config, do_stable_layer_norm=True, feat_extract_norm="layer"
    ),
    "hubert": _sound("HubertForCTC", t.HubertConfig),
    "wavlm": _sound("WavLMForSequenceClassification", t.WavLMConfig),
    "sew": _sound("SEWForCTC", t.SEWConfig, squeeze_factor=2),
    "clip": _clip,
    "siglip": _siglip,
    "llava": _llava,
}
