"""GGUF's key-value part: hyperparameters and vocabulary."""

import re
from collections.abc import Mapping

import gguf

from compression.checkpoints.checkpoint import Checkpoint
from compression.origin import Origin
from export.gguf.architectures import (
    ARCHITECTURES,
    context_length,
    local_rope_theta,
    longrope_attention_factor,
    rope_settings,
    sliding_layers,
)
from export.gguf.special import model_name
from export.gguf.tokenizer import Vocabulary


def write_origin(writer: gguf.GGUFWriter, checkpoint: Checkpoint, origin: Origin | None, *, strips: bool) -> None:
    """general.name, .license and .base_model.*: what the model was made of, where it is known.

    strips  whether the name is to tell llama.cpp that special tokens swallow blanks (`model_name`)
    """
    writer.add_name(model_name(origin.name if origin else checkpoint.model_type, strips))
    if origin is None:
        return
    if origin.license:
        writer.add_license(origin.license)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, origin.name)
    if origin.organization:
        writer.add_base_model_organization(0, origin.organization)
    if origin.url:
        writer.add_base_model_repo_url(0, origin.url)
    if origin.revision:
        writer.add_base_model_version(0, origin.revision)


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
    writer.add_head_count_kv(config["num_key_value_heads"])
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
        "eot": writer.add_eot_token_id,
        "eom": writer.add_eom_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for name, id in vocabulary.special.items():
        add_special[name](id)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    _write_templates(writer, vocabulary.templates)


def _write_templates(writer: gguf.GGUFWriter, templates: Mapping[str, str]) -> None:
    """The default one as tokenizer.chat_template, the others under their names, sorted (`add_chat_template` writes a set in any order)."""
    if "default" in templates:
        writer.add_chat_template(templates["default"])
    named = {re.sub(r"[^a-zA-Z0-9]", "_", name): text for name, text in sorted(templates.items()) if name != "default"}
    for name, text in named.items():
        writer.add_string(gguf.Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name), text)
    if named:
        writer.add_array(gguf.Keys.Tokenizer.CHAT_TEMPLATES, list(named))
