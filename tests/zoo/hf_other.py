"""Yet other families of transformers, from language over video to detection and speech synthesis."""

from __future__ import annotations

import torch
import transformers as t
from torch import Tensor, nn

from .hf_senses import VIT, _vision, pixels
from .hf_text import BERT, GROUPED, SIZES, VOCABULARY, _seq2seq, _text, tokens
from .parts import Factory

ENDS = ["stage1", "stage2", "stage3", "stage4"]
SWITCH = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}

OTHER: dict[str, Factory] = {
    "rembert": _text(
        "RemBertForMaskedLM", t.RemBertConfig, BERT, input_embedding_size=32, output_embedding_size=32
    ),
    "ibert": _text("IBertForMaskedLM", t.IBertConfig, BERT),
    "layoutlm": _text(
        "LayoutLMForTokenClassification", t.LayoutLMConfig, BERT, max_2d_position_embeddings=16
    ),
    "ernie": _text("ErnieForMaskedLM", t.ErnieConfig, BERT),
    "megatron_bert": _text("MegatronBertForMaskedLM", t.MegatronBertConfig, BERT),
    "xmod": _text("XmodForMaskedLM", t.XmodConfig, BERT, languages=["en"], default_language="en"),
    "roc_bert": _text(
        "RoCBertForSequenceClassification",
        t.RoCBertConfig,
        BERT,
        shape_vocab_size=VOCABULARY,
        pronunciation_vocab_size=VOCABULARY,
        shape_embed_dim=16,
        pronunciation_embed_dim=16,
    ),
    "arcee": _text("ArceeForCausalLM", t.ArceeConfig, GROUPED),
    "helium": _text("HeliumForCausalLM", t.HeliumConfig, GROUPED, head_dim=16),
    "diffllama": _text("DiffLlamaForCausalLM", t.DiffLlamaConfig, GROUPED),
    "gpt_neox_japanese": _text(
        "GPTNeoXJapaneseForCausalLM",
        t.GPTNeoXJapaneseConfig,
        {k: v for k, v in SIZES.items() if "inter" not in k},
    ),
    "bamba": _text(
        "BambaForCausalLM",
        t.BambaConfig,
        GROUPED,
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_n_groups=1,
        attn_layer_indices=[1],
    ),
    "zamba2": _text(
        "Zamba2ForCausalLM",
        t.Zamba2Config,
        {**GROUPED, "num_hidden_layers": 3},
        layers_block_type=["mamba", "hybrid", "mamba"],
        mamba_d_state=8,
        mamba_ngroups=1,
        n_mamba_heads=8,
        mamba_headdim=16,
        num_mem_blocks=1,
    ),
    "granitemoe": _text(
        "GraniteMoeForCausalLM", t.GraniteMoeConfig, GROUPED, num_local_experts=4, num_experts_per_tok=2
    ),
    "dbrx": _text(
        "DbrxForCausalLM",
        t.DbrxConfig,
        {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 32},
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    "switch": _seq2seq(
        "SwitchTransformersForConditionalGeneration", t.SwitchTransformersConfig, **SWITCH, num_experts=4
    ),
    "umt5": _seq2seq("UMT5ForConditionalGeneration", t.UMT5Config, **{**SWITCH, "num_layers": 1}),
    "longt5": _seq2seq(
        "LongT5ForConditionalGeneration", t.LongT5Config, **{**SWITCH, "num_layers": 1}, local_radius=4
    ),
    "hf_dinov2_registers": _vision(
        "Dinov2WithRegistersForImageClassification", t.Dinov2WithRegistersConfig, **VIT
    ),
    "hf_clipseg_vision": _vision(
        "CLIPVisionModelWithProjection", t.CLIPVisionConfig, **VIT, projection_dim=32
    ),
    "hf_textnet": _vision(
        "TextNetForImageClassification",
        t.TextNetConfig,
        64,
        conv_layer_kernel_sizes=[[[3, 3]], [[3, 3], [1, 3]], [[3, 3]], [[3, 3], [3, 1]]],
        conv_layer_strides=[[1], [2, 1], [2], [2, 1]],
        hidden_sizes=[16, 16, 32, 48, 64],
        stem_out_channels=16,
    ),
    "hf_upernet": _vision(
        "UperNetForSemanticSegmentation",
        t.UperNetConfig,
        64,
        backbone_config=t.ConvNextConfig(
            hidden_sizes=[16, 32, 48, 64],
            depths=[1, 1, 1, 1],
            out_features=ENDS,
        ),
        hidden_size=32,
        auxiliary_in_channels=48,
        auxiliary_channels=32,
    ),
    "hf_depth_anything": _vision(
        "DepthAnythingForDepthEstimation",
        t.DepthAnythingConfig,
        56,
        backbone_config=t.Dinov2Config(
            **{**VIT, "image_size": 56, "patch_size": 14, "num_hidden_layers": 4},
            out_features=ENDS,
            reshape_hidden_states=False,
        ),
        patch_size=14,
        reassemble_hidden_size=64,
        neck_hidden_sizes=[16, 16, 32, 32],
        fusion_hidden_size=16,
        head_hidden_size=16,
    ),
}


def _video(model: str, config: t.PreTrainedConfig) -> Factory:
    def build() -> tuple[nn.Module, dict[str, Tensor]]:
        frames = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        return getattr(t, model)(config), {"pixel_values": frames}

    return build


def _pair(model: str, config: t.PreTrainedConfig) -> Factory:
    return lambda: (getattr(t, model)(config), {"input_ids": tokens(), "pixel_values": pixels()})


def _detr() -> tuple[nn.Module, dict[str, Tensor]]:
    backbone = t.ResNetConfig(
        embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], out_features=["stage2"]
    )
    config = t.DetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        num_queries=6,
        num_labels=5,
    )
    return t.DetrForObjectDetection(config), {"pixel_values": pixels(64)}


def _encodec() -> tuple[nn.Module, dict[str, Tensor]]:
    config = t.EncodecConfig(
        num_filters=16, upsampling_ratios=[4, 2], hidden_size=32, codebook_size=16, num_lstm_layers=1
    )
    return t.EncodecModel(config).encoder, (torch.randn(2, 1, 320),)  # type: ignore[return-value]


def _series(model: str, config: t.PreTrainedConfig) -> Factory:
    def build() -> tuple[nn.Module, dict[str, Tensor]]:
        return getattr(t, model)(config), {"past_values": torch.randn(2, 32, 3)}

    return build


OTHER |= {
    "videomae": _video(
        "VideoMAEForVideoClassification", t.VideoMAEConfig(**VIT, num_frames=4, tubelet_size=2, num_labels=5)
    ),
    "timesformer": _video("TimesformerForVideoClassification", t.TimesformerConfig(**VIT, num_frames=4)),
    "vivit": _video(
        "VivitForVideoClassification", t.VivitConfig(**VIT, num_frames=4, tubelet_size=[2, 8, 8])
    ),
    "vilt": _pair("ViltForQuestionAnswering", t.ViltConfig(**VIT, vocab_size=VOCABULARY, num_labels=5)),
    "detr_hf": _detr,
    "encodec": _encodec,
    "patchtsmixer": _series(
        "PatchTSMixerForPrediction",
        t.PatchTSMixerConfig(
            context_length=32,
            patch_length=8,
            patch_stride=8,
            num_input_channels=3,
            d_model=32,
            num_layers=2,
            prediction_length=4,
        ),
    ),
}
