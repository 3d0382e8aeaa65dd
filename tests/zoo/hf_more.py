"""Further families of transformers: latent attention, hybrids, sparse attention, audio, time series."""

from __future__ import annotations

from typing import Any

import torch
import transformers as t
from torch import Tensor, nn

from .hf_senses import VIT, _sound, _vision
from .hf_text import BART, BERT, GROUPED, SIZES, SPECIAL, VOCABULARY, _seq2seq, _text
from .parts import Factory

LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}

MORE: dict[str, Factory] = {
    "deepseek_v3": _text(
        "DeepseekV3ForCausalLM",
        t.DeepseekV3Config,
        {**SIZES, "num_key_value_heads": 4, **LATENT},
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        first_k_dense_replace=1,
    ),
    "deepseek_v2": _text(
        "DeepseekV2ForCausalLM",
        t.DeepseekV2Config,
        {**SIZES, "num_key_value_heads": 4, **LATENT},
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        first_k_dense_replace=1,
    ),
    "gpt_oss": _text(
        "GptOssForCausalLM", t.GptOssConfig, GROUPED, num_local_experts=4, num_experts_per_tok=2, head_dim=16
    ),
    "jamba": _text(
        "JambaForCausalLM",
        t.JambaConfig,
        GROUPED,
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
        mamba_dt_rank=4,
        mamba_d_state=8,
    ),
    "glm4": _text("Glm4ForCausalLM", t.Glm4Config, GROUPED, head_dim=16),
    "cohere2": _text("Cohere2ForCausalLM", t.Cohere2Config, GROUPED),
    "qwen3_next": _text(
        "Qwen3NextForCausalLM",
        t.Qwen3NextConfig,
        GROUPED,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        head_dim=16,
        layer_types=["linear_attention", "full_attention"],
    ),
    "recurrent_gemma": _text(
        "RecurrentGemmaForCausalLM",
        t.RecurrentGemmaConfig,
        {**GROUPED, "num_hidden_layers": 3},
        lru_width=64,
        attention_window_size=8,
    ),
    "falcon_h1": _text(
        "FalconH1ForCausalLM",
        t.FalconH1Config,
        GROUPED,
        mamba_d_ssm=64,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_n_groups=1,
        head_dim=16,
    ),
    "lfm2": _text("Lfm2ForCausalLM", t.Lfm2Config, GROUPED, layer_types=["conv", "full_attention"]),
    "biogpt": _text("BioGptForCausalLM", t.BioGptConfig, SIZES, max_position_embeddings=32),
    "xglm": _text(
        "XGLMForCausalLM",
        t.XGLMConfig,
        {"d_model": 64, "ffn_dim": 256, "num_layers": 2, "attention_heads": 4},
        max_position_embeddings=32,
    ),
    "ctrl": _text("CTRLLMHeadModel", t.CTRLConfig, {"n_embd": 64, "dff": 256, "n_layer": 2, "n_head": 4}),
    "xlnet": _text(
        "XLNetLMHeadModel", t.XLNetConfig, {"d_model": 64, "d_inner": 256, "n_layer": 2, "n_head": 4}
    ),
    "nystromformer": _text(
        "NystromformerForMaskedLM", t.NystromformerConfig, BERT, num_landmarks=4, segment_means_seq_len=12
    ),
    "longformer": _text(
        "LongformerForMaskedLM",
        t.LongformerConfig,
        {**BERT, "max_position_embeddings": 34},
        attention_window=4,
    ),
    "big_bird": _text("BigBirdForMaskedLM", t.BigBirdConfig, BERT, attention_type="original_full"),
    "funnel": _text(
        "FunnelForSequenceClassification",
        t.FunnelConfig,
        {"d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 256, "block_sizes": [1, 1]},
    ),
    "convbert": _text("ConvBertForMaskedLM", t.ConvBertConfig, BERT, embedding_size=64, conv_kernel_size=3),
    "roformer": _text("RoFormerForMaskedLM", t.RoFormerConfig, BERT, embedding_size=64),
    "camembert": _text("CamembertForMaskedLM", t.CamembertConfig, BERT),
    "deberta": _text(
        "DebertaForMaskedLM", t.DebertaConfig, BERT, relative_attention=True, pos_att_type=["p2c", "c2p"]
    ),
    "mt5": _seq2seq(
        "MT5ForConditionalGeneration", t.MT5Config, d_model=64, d_kv=16, d_ff=256, num_layers=1, num_heads=4
    ),
    "led": _seq2seq(
        "LEDForConditionalGeneration",
        t.LEDConfig,
        **{k: v for k, v in BART.items() if "max" not in k},
        attention_window=4,
        max_encoder_position_embeddings=32,
        max_decoder_position_embeddings=32,
    ),
    "prophetnet": _seq2seq(
        "ProphetNetForConditionalGeneration",
        t.ProphetNetConfig,
        hidden_size=64,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        num_encoder_layers=1,
        num_decoder_layers=1,
        num_encoder_attention_heads=4,
        num_decoder_attention_heads=4,
        max_position_embeddings=32,
    ),
    "hf_data2vec_vision": _vision(
        "Data2VecVisionForImageClassification", t.Data2VecVisionConfig, **VIT, use_relative_position_bias=True
    ),
    "hf_vit_msn": _vision("ViTMSNForImageClassification", t.ViTMSNConfig, **VIT),
    "hf_ijepa": _vision("IJepaForImageClassification", t.IJepaConfig, **VIT),
    "hf_dpt": _vision(
        "DPTForSemanticSegmentation",
        t.DPTConfig,
        **{**VIT, "num_hidden_layers": 4},
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 16, 32, 32],
        fusion_hidden_size=16,
    ),
    "hf_mobilevitv2": _vision(
        "MobileViTV2ForImageClassification", t.MobileViTV2Config, 64, width_multiplier=0.25
    ),
    "hf_pvt_v2": _vision(
        "PvtV2ForImageClassification",
        t.PvtV2Config,
        64,
        image_size=64,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 3, 4],
    ),
    "hf_swiftformer": _vision(
        "SwiftFormerForImageClassification",
        t.SwiftFormerConfig,
        64,
        image_size=64,
        depths=[1, 1, 1, 1],
        embed_dims=[16, 24, 32, 48],
    ),
    "hf_hiera": _vision(
        "HieraForImageClassification",
        t.HieraConfig,
        64,
        image_size=[64, 64],
        embed_dim=32,
        depths=[1, 1],
        num_heads=[1, 2],
        query_stride=[2, 2],
        num_query_pool=1,
        masked_unit_size=[8, 8],
        masked_unit_attention=[True, True],
        initializer_range=0.02,
    ),
    "hf_dinov3": _vision("DINOv3ViTModel", t.DINOv3ViTConfig, **VIT),
    "hf_dinat_free_glpn": _vision(
        "GLPNForDepthEstimation",
        t.GLPNConfig,
        64,
        hidden_sizes=[16, 16, 32, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
    ),
    "data2vec_audio": _sound("Data2VecAudioForCTC", t.Data2VecAudioConfig),
    "unispeech": _sound("UniSpeechForCTC", t.UniSpeechConfig, num_codevectors_per_group=8, codevector_dim=16),
    "wav2vec2_conformer": _sound(
        "Wav2Vec2ConformerForCTC", t.Wav2Vec2ConformerConfig, conv_depthwise_kernel_size=3
    ),
}


def _spectrogram() -> tuple[nn.Module, dict[str, Tensor]]:
    model = t.ASTForAudioClassification(
        t.ASTConfig(**SIZES, max_length=48, num_mel_bins=16, patch_size=8, frequency_stride=8, time_stride=8)
    )
    return model, {"input_values": torch.randn(2, 48, 16)}


def _series() -> tuple[nn.Module, dict[str, Tensor]]:
    settings: dict[str, Any] = {
        "d_model": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = t.PatchTSTConfig(
        num_input_channels=3,
        context_length=32,
        patch_length=8,
        patch_stride=8,
        prediction_length=4,
        **settings,
    )
    return t.PatchTSTForPrediction(config), {"past_values": torch.randn(2, 32, 3)}


def _perceiver() -> tuple[nn.Module, dict[str, Tensor]]:
    config = t.PerceiverConfig(
        num_latents=8,
        d_latents=32,
        d_model=32,
        num_blocks=1,
        num_self_attends_per_block=2,
        num_self_attention_heads=4,
        num_cross_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=16,
    )
    ids = torch.randint(3, VOCABULARY, (2, 16))
    return t.PerceiverForSequenceClassification(config), {"inputs": ids, "attention_mask": torch.ones(2, 16)}


def _bert_masked() -> tuple[nn.Module, dict[str, Tensor]]:
    ids = torch.randint(3, VOCABULARY, (2, 12))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 8:] = 0
    model = t.BertForSequenceClassification(t.BertConfig(**BERT, vocab_size=VOCABULARY, **SPECIAL))
    return model, {"input_ids": ids, "attention_mask": mask}


def _eager(name: str) -> Factory:
    """GPT-2 or Llama with attention written out and no cache."""

    def build() -> tuple[nn.Module, dict[str, Tensor]]:
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4} if name == "gpt2" else GROUPED
        config = {"gpt2": t.GPT2Config, "llama": t.LlamaConfig}[name](
            **sizes, vocab_size=VOCABULARY, use_cache=False, attn_implementation="eager"
        )
        model = t.GPT2LMHeadModel(config) if name == "gpt2" else t.LlamaForCausalLM(config)
        return model, {"input_ids": torch.randint(3, VOCABULARY, (2, 12))}

    return build


MORE |= {
    "ast": _spectrogram,
    "patchtst": _series,
    "perceiver": _perceiver,
    "bert_attention_mask": _bert_masked,
    "gpt2_eager": _eager("gpt2"),
    "llama_eager": _eager("llama"),
}
