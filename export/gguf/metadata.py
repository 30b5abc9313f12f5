"""GGUF's key-value part: hyperparameters and vocabulary."""

import gguf

from compression.checkpoint import Checkpoint
from export.gguf.architectures import (
    ARCHITECTURES,
    context_length,
    local_rope_theta,
    longrope_attention_factor,
    rope_settings,
    sliding_layers,
)
from export.gguf.tokenizer import Vocabulary


def write_hyperparameters(writer: gguf.GGUFWriter, checkpoint: Checkpoint, file_type: int) -> None:
    """general.* and the architecture's keys. The context is what llama.cpp runs as transformers does (`context_length`)."""
    config = checkpoint.config
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(checkpoint.vocab_size)
    writer.add_context_length(context_length(checkpoint)[0])
    writer.add_embedding_length(checkpoint.hidden_size)
    writer.add_block_count(checkpoint.num_layers)
    writer.add_feed_forward_length(checkpoint.intermediate_size)
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_key_length(checkpoint.head_dim)
    writer.add_value_length(checkpoint.head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    _write_rope(writer, checkpoint)
    sliding = sliding_layers(config)
    if ARCHITECTURES[checkpoint.model_type].slides and any(sliding):
        writer.add_sliding_window(config["sliding_window"])
        writer.add_sliding_window_pattern(sliding)
        writer.add_rope_freq_base_swa(local_rope_theta(config))
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def _write_rope(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    rope = rope_settings(checkpoint.config)
    writer.add_rope_dimension_count(int(checkpoint.head_dim * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_attn_factors(longrope_attention_factor(rope, checkpoint.max_length))
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)


def write_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    """tokenizer.*"""
    writer.add_tokenizer_model(vocabulary.definition.model)
    writer.add_tokenizer_pre(vocabulary.definition.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.definition.prepend != "never")
    add_special = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for name, id in vocabulary.special.items():
        add_special[name](id)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
