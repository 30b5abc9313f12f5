"""What llama.cpp's graph of each family can express, in one table, and what a config says of it. Imports no torch: used while planning.

Read in llama.cpp's src/models/*.cpp: which parts of a model its graph has a place for decides what is written, and what is refused.
"""

import math
from dataclasses import dataclass
from typing import Any

from compression.checkpoints.checkpoint import Checkpoint
from compression.errors import Incompatible
from export.checks import check_settings, rope_setting

SILU, GELU = "silu", "gelu_pytorch_tanh"
CELLS = 256  # llama.cpp rounds the length of a context up to a multiple of this
_ROPE_KEYS: dict[str, tuple[str, ...]] = {  # what each rope type needs besides, which transformers fills in where it has a default
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "yarn": ("rope_theta", "factor", "original_max_position_embeddings"),
    "llama3": ("rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "longrope": ("rope_theta", "original_max_position_embeddings", "short_factor", "long_factor"),
}
NOPE_STEP = 4  # llama.cpp's smollm3 leaves rope out of every fourth layer, whatever the file says


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's graphs.

    name          GGUF's name of it
    ropes         the rope types it takes
    partial_rope  whether it can turn the first part of a head only
    interleaved   it turns neighbouring rows of q and k together (GGML_ROPE_TYPE_NORMAL), transformers those half a head apart
    biases        the settings of a config that give linear layers biases, of those it has a place for
    square        it needs heads x head_dim = hidden_size
    activation    of the MLP
    slides        its attention slides where the file says so; of the others the context is cut to the window
    ties          it can do without a head of its own; for the others the embedding is written a second time
    """

    name: str
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    partial_rope: bool = False
    interleaved: bool = False
    biases: tuple[str, ...] = ()
    square: bool = False
    activation: str = SILU
    slides: bool = False
    ties: bool = True


_LLAMA = Architecture("llama", ("default", "linear", "yarn", "llama3"), interleaved=True, biases=("attention_bias", "mlp_bias"))

ARCHITECTURES: dict[str, Architecture] = {  # by transformers' model_type
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2", square=True),
    "qwen3": Architecture("qwen3"),
    "smollm3": Architecture("smollm3", interleaved=True),
    "olmo2": Architecture("olmo2", square=True, ties=False),
    "gemma3_text": Architecture("gemma3", ("default", "linear"), activation=GELU, slides=True),
    "phi3": Architecture("phi3", ("default", "longrope"), partial_rope=True, square=True),
}


def rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters`: rope_type, rope_theta and the rest. Of a model whose layers differ, those of its layers without a window."""
    rope = config["rope_parameters"]
    return rope.get("full_attention", rope)


def local_rope_theta(config: dict[str, Any]) -> float:
    """The rope base of gemma3's layers with a window."""
    return rope_setting(rope_setting(config["rope_parameters"], "sliding_attention"), "rope_theta")


def longrope_attention_factor(rope: dict[str, Any], max_length: int) -> float:
    """What cosines and sines are multiplied by (LongRoPE, Ding et al. 2024): sqrt(1 + ln(factor) / ln(original length))."""
    original = rope_setting(rope, "original_max_position_embeddings")
    factor = rope.get("factor") or max_length / original
    given = rope.get("attention_factor")
    return given if given is not None else math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def sliding_layers(config: dict[str, Any]) -> list[bool]:
    """Of each layer whether its attention slides. Config classes without windows have no `sliding_window`, and null where it is off."""
    if config.get("sliding_window") is None:
        return [False] * config["num_hidden_layers"]
    if "layer_types" not in config:  # mistral and phi3: every layer
        return [True] * config["num_hidden_layers"]
    return [kind == "sliding_attention" for kind in config["layer_types"]]


def context_length(checkpoint: Checkpoint) -> tuple[int, str | None]:
    """The longest text that llama.cpp runs as transformers does, and why that is less than the model takes, if it is."""
    config, whole = checkpoint.config, checkpoint.max_length
    if not ARCHITECTURES[checkpoint.model_type].slides and any(sliding_layers(config)) and config["sliding_window"] < whole:
        window = config["sliding_window"]
        return window, f"llama.cpp does not slide this model's attention: its context is cut from {whole} to the window of {window} tokens"
    rope = rope_settings(config)
    if rope["rope_type"] == "longrope" and (original := rope_setting(rope, "original_max_position_embeddings")) < whole:
        short = original // CELLS * CELLS
        return short, (
            f"llama.cpp takes longrope's long factors for every text of a context that is longer than {short} tokens, transformers for "
            f"texts that are: the file says {short} of {whole}; open it with more (n_ctx) for longer texts only"
        )
    return whole, None


def check_architecture(checkpoint: Checkpoint) -> None:
    """Raises Incompatible (key "uses") for a family that llama.cpp lacks, or a feature that its graph of the family lacks."""
    config, model_type = checkpoint.config, checkpoint.model_type
    if model_type not in ARCHITECTURES:
        raise Incompatible(f"export.gguf does not write the architecture {model_type!r}; it writes {', '.join(ARCHITECTURES)}", key="uses")
    check_settings(checkpoint)
    architecture = ARCHITECTURES[model_type]
    activation = config["hidden_activation" if model_type == "gemma3_text" else "hidden_act"]
    if activation != architecture.activation:
        raise Incompatible(
            f"llama.cpp runs {model_type} with {architecture.activation} only; this model's activation is {activation!r}", key="uses"
        )
    _check_rope(config, architecture)
    if architecture.square and config["num_attention_heads"] * checkpoint.head_dim != checkpoint.hidden_size:
        raise Incompatible(
            f"llama.cpp's {architecture.name} needs heads x head_dim = hidden_size; export this pruned model to ONNX instead", key="uses"
        )
    if wrong := [key for key in ("attention_bias", "mlp_bias") if config.get(key) and key not in architecture.biases]:
        raise Incompatible(
            f"llama.cpp's {architecture.name} has no attention biases or MLP biases, and this model does ({', '.join(wrong)}); "
            "export it to ONNX instead",
            key="uses",
        )
    if model_type == "smollm3":
        _check_smollm3(config)
    if model_type == "gemma3_text":
        _check_gemma3(checkpoint)


def _check_rope(config: dict[str, Any], architecture: Architecture) -> None:
    rope = rope_settings(config)
    kind = rope_setting(rope, "rope_type")
    unwritten = [key for key in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(key) is not None]
    known = kind in architecture.ropes and (not unwritten or kind == "longrope")
    whole = rope.get("partial_rotary_factor", 1.0) == 1.0
    if not known or not (whole or architecture.partial_rope) or not rope.get("truncate", True):
        raise Incompatible(
            f"the rope settings {rope} cannot be written for {config['model_type']}; written are "
            f"{'' if architecture.partial_rope else 'whole '}heads of type {', '.join(architecture.ropes)}, "
            "yarn with its own scaling of attention",
            key="uses",
        )
    for key in _ROPE_KEYS[kind]:
        rope_setting(rope, key)
    if kind == "longrope" and rope["original_max_position_embeddings"] < CELLS:
        raise Incompatible(
            f"llama.cpp's contexts are multiples of {CELLS} tokens, so this model, whose longrope begins at "
            f"{rope['original_max_position_embeddings']}, would always run with the long factors",
            key="uses",
        )


def _check_smollm3(config: dict[str, Any]) -> None:
    found = config["no_rope_layers"]
    if [bool(rope) for rope in found] != [layer % NOPE_STEP != 0 for layer in range(1, config["num_hidden_layers"] + 1)]:
        raise Incompatible(
            f"llama.cpp's smollm3 leaves rope out of every {NOPE_STEP}th layer, and this model has no_rope_layers {found}; export it to ONNX instead",
            key="uses",
        )


def _check_gemma3(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    # llama.cpp knows the one size of Gemma 3 that scales otherwise (27B) by its 62 layers
    expected = checkpoint.hidden_size // config["num_attention_heads"] if checkpoint.num_layers == 62 else checkpoint.head_dim
    scalar = config["query_pre_attn_scalar"]
    if scalar != expected:
        raise Incompatible(
            f"llama.cpp's gemma3 scales attention by {expected}^-0.5 for a model of this shape, and this one has query_pre_attn_scalar "
            f"{scalar}; export it to ONNX instead",
            key="uses",
        )
    for key in ("attn_logit_softcapping", "use_bidirectional_attention"):
        if config.get(key):
            raise Incompatible(f"llama.cpp's gemma3 has no {key}, and this model does", key="uses")
