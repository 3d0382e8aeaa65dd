"""Language models of transformers: tiny configurations, random weights, nothing downloaded.

Feed-forward layers are four times as wide as the model, as in the published configurations.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as t
from torch import Tensor, nn

from .parts import Factory

VOCABULARY = 96
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
GROUPED = {**SIZES, "num_key_value_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tokens(length: int = 12, batch: int = 2) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def _text(model: str, config: type[t.PreTrainedConfig], sizes: dict[str, Any], **settings: Any) -> Factory:
    """The class called `model`, with `sizes`, `settings` and the small vocabulary; input: token ids."""

    def build() -> tuple[nn.Module, dict[str, Tensor]]:
        made = config(**{"vocab_size": VOCABULARY, **SPECIAL, **sizes, **settings})
        return getattr(t, model)(made), {"input_ids": tokens()}

    return build


def _seq2seq(model: str, config: type[t.PreTrainedConfig], **settings: Any) -> Factory:
    """As `_text`, with decoder tokens of another length."""

    def build() -> tuple[nn.Module, dict[str, Tensor]]:
        made = config(**{"vocab_size": VOCABULARY, **SPECIAL, "decoder_start_token_id": 1, **settings})
        inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(7)}
        return getattr(t, model)(made), inputs

    return build


BERT = {**SIZES, "max_position_embeddings": 32, "type_vocab_size": 2}
BART = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256,
    "max_position_embeddings": 32,
}

ENCODERS: dict[str, Factory] = {
    "bert": _text("BertForMaskedLM", t.BertConfig, BERT),
    "bert_classifier": _text("BertForSequenceClassification", t.BertConfig, BERT),
    "roberta": _text("RobertaForMaskedLM", t.RobertaConfig, BERT),
    "xlm_roberta": _text("XLMRobertaForTokenClassification", t.XLMRobertaConfig, BERT),
    "distilbert": _text(
        "DistilBertForSequenceClassification",
        t.DistilBertConfig,
        {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 256, "max_position_embeddings": 32},
    ),
    "electra": _text("ElectraForPreTraining", t.ElectraConfig, BERT, embedding_size=32),
    "albert": _text("AlbertForMaskedLM", t.AlbertConfig, BERT, embedding_size=32),
    "deberta_v2": _text(
        "DebertaV2ForMaskedLM",
        t.DebertaV2Config,
        BERT,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
    ),
    "mpnet": _text("MPNetForMaskedLM", t.MPNetConfig, BERT),
    "xlm": _text(
        "XLMWithLMHeadModel",
        t.XLMConfig,
        {"emb_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 32},
        pad_index=0,
        bos_index=1,
        eos_index=2,
        use_lang_emb=False,
    ),
    "mobilebert": _text(
        "MobileBertForMaskedLM",
        t.MobileBertConfig,
        BERT,
        embedding_size=64,
        intra_bottleneck_size=32,
        true_hidden_size=32,
    ),
    "squeezebert": _text(
        "SqueezeBertForSequenceClassification", t.SqueezeBertConfig, BERT, embedding_size=64
    ),
    "fnet": _text("FNetForMaskedLM", t.FNetConfig, {k: v for k, v in BERT.items() if "heads" not in k}),
    "modernbert": _text("ModernBertForMaskedLM", t.ModernBertConfig, SIZES, cls_token_id=1, sep_token_id=2),
    "esm": _text("EsmForMaskedLM", t.EsmConfig, BERT, mask_token_id=3, position_embedding_type="rotary"),
}

GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}

DECODERS: dict[str, Factory] = {
    "llama": _text("LlamaForCausalLM", t.LlamaConfig, GROUPED),
    "mistral": _text("MistralForCausalLM", t.MistralConfig, GROUPED, sliding_window=8),
    "qwen2": _text("Qwen2ForCausalLM", t.Qwen2Config, GROUPED),
    "qwen3": _text("Qwen3ForCausalLM", t.Qwen3Config, GROUPED, head_dim=16),
    "gemma": _text("GemmaForCausalLM", t.GemmaConfig, GROUPED, head_dim=16),
    "gemma2": _text("Gemma2ForCausalLM", t.Gemma2Config, GROUPED, head_dim=16, query_pre_attn_scalar=16),
    "gemma3": _text("Gemma3ForCausalLM", t.Gemma3TextConfig, GROUPED, head_dim=16),
    "phi": _text("PhiForCausalLM", t.PhiConfig, SIZES),
    "phi3": _text("Phi3ForCausalLM", t.Phi3Config, GROUPED),
    "olmo": _text("OlmoForCausalLM", t.OlmoConfig, SIZES),
    "olmo2": _text("Olmo2ForCausalLM", t.Olmo2Config, GROUPED),
    "stablelm": _text("StableLmForCausalLM", t.StableLmConfig, GROUPED),
    "gpt2": _text("GPT2LMHeadModel", t.GPT2Config, GPT2),
    "gpt_neo": _text(
        "GPTNeoForCausalLM",
        t.GPTNeoConfig,
        {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        window_size=8,
        max_position_embeddings=32,
    ),
    "gpt_neox": _text("GPTNeoXForCausalLM", t.GPTNeoXConfig, SIZES, max_position_embeddings=32),
    "gptj": _text("GPTJForCausalLM", t.GPTJConfig, GPT2, rotary_dim=8),
    "codegen": _text("CodeGenForCausalLM", t.CodeGenConfig, GPT2, rotary_dim=8, n_ctx=32),
    "opt": _text(
        "OPTForCausalLM",
        t.OPTConfig,
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 256},
        word_embed_proj_dim=64,
        max_position_embeddings=32,
    ),
    "bloom": _text("BloomForCausalLM", t.BloomConfig, {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "falcon": _text(
        "FalconForCausalLM",
        t.FalconConfig,
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "falcon_new": _text(
        "FalconForCausalLM",
        t.FalconConfig,
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2},
        new_decoder_architecture=True,
    ),
    "mpt": _text("MptForCausalLM", t.MptConfig, {"d_model": 64, "n_layers": 2, "n_heads": 4}, max_seq_len=32),
    "starcoder2": _text("Starcoder2ForCausalLM", t.Starcoder2Config, GROUPED),
    "cohere": _text("CohereForCausalLM", t.CohereConfig, GROUPED),
    "granite": _text("GraniteForCausalLM", t.GraniteConfig, GROUPED),
    "nemotron": _text("NemotronForCausalLM", t.NemotronConfig, GROUPED),
    "persimmon": _text("PersimmonForCausalLM", t.PersimmonConfig, SIZES),
    "glm": _text("GlmForCausalLM", t.GlmConfig, GROUPED, head_dim=16),
    "smollm3": _text("SmolLM3ForCausalLM", t.SmolLM3Config, GROUPED),
    "gpt_bigcode": _text("GPTBigCodeForCausalLM", t.GPTBigCodeConfig, GPT2),
}

MIXTURES: dict[str, Factory] = {
    "mixtral": _text(
        "MixtralForCausalLM", t.MixtralConfig, GROUPED, num_local_experts=4, num_experts_per_tok=2
    ),
    "qwen2_moe": _text(
        "Qwen2MoeForCausalLM",
        t.Qwen2MoeConfig,
        GROUPED,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=64,
    ),
    "qwen3_moe": _text(
        "Qwen3MoeForCausalLM",
        t.Qwen3MoeConfig,
        GROUPED,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        head_dim=16,
    ),
    "olmoe": _text("OlmoeForCausalLM", t.OlmoeConfig, GROUPED, num_experts=4, num_experts_per_tok=2),
    "phimoe": _text("PhimoeForCausalLM", t.PhimoeConfig, GROUPED, num_local_experts=4, num_experts_per_tok=2),
}

STATE_SPACE: dict[str, Factory] = {
    "mamba": _text(
        "MambaForCausalLM",
        t.MambaConfig,
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4},
    ),
    "mamba2": _text(
        "Mamba2ForCausalLM",
        t.Mamba2Config,
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "head_dim": 16, "num_heads": 4},
        n_groups=2,
        chunk_size=8,
    ),
    "rwkv": _text(
        "RwkvForCausalLM",
        t.RwkvConfig,
        {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "intermediate_size": 128},
        context_length=32,
    ),
}

T5 = {"d_model": 64, "d_kv": 16, "d_ff": 256, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4}

SEQ2SEQ: dict[str, Factory] = {
    "t5": _seq2seq("T5ForConditionalGeneration", t.T5Config, **T5),
    "t5_gated": _seq2seq(
        "T5ForConditionalGeneration",
        t.T5Config,
        **T5,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    ),
    "bart": _seq2seq("BartForConditionalGeneration", t.BartConfig, **BART),
    "mbart": _seq2seq("MBartForConditionalGeneration", t.MBartConfig, **BART),
    "pegasus": _seq2seq("PegasusForConditionalGeneration", t.PegasusConfig, **BART),
    "marian": _seq2seq(
        "MarianMTModel", t.MarianConfig, **BART, decoder_vocab_size=VOCABULARY, forced_eos_token_id=2
    ),
    "blenderbot": _seq2seq("BlenderbotForConditionalGeneration", t.BlenderbotConfig, **BART),
    "m2m_100": _seq2seq("M2M100ForConditionalGeneration", t.M2M100Config, **BART),
}
