"""Which GGUF types there are, and which checkpoints can become them. Imports no torch: used while planning."""

import json
from typing import Any

from compression.checkpoint import Checkpoint
from compression.errors import Incompatible
from compression.quantization.settings import codes_of, layer_codes
from export.gguf.pretokenizer import recognize

FLOATS = ("f32", "f16", "bf16")
WRITTEN = (*FLOATS, "q8_0")  # written here, tensor by tensor; also the types of embedding and head
CARRY = "carry"  # the checkpoint's own codes, as q4_0, q4_1 or q8_0
QUANTIZED = (
    "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k",
)  # fmt: skip  # rounded by llama.cpp's own quantizer
TYPES = (*WRITTEN, CARRY, *QUANTIZED)

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # model_type -> GGUF's name
BLOCK = 32  # weights that share a scale in q8_0, q4_0, q4_1, q5_0, q5_1
CARRIED_BITS = (4, 8)


def tensor_types(checkpoint: Checkpoint, *, type: str, embedding_type: str | None, head_type: str | None) -> tuple[str, str]:
    """Types of embedding and head. None stands for `type` where that is a float type, else for the checkpoint's own dtype."""
    own = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[checkpoint.dtype]
    embedding = embedding_type or (type if type in FLOATS else own)
    return embedding, head_type or (embedding if checkpoint.tied else (type if type in FLOATS else own))


def rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """rope_type, rope_theta and the rest, from either spelling of config.json (`rope_parameters`, or before it `rope_scaling`)."""
    rope = dict(config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0), **(config.get("rope_scaling") or {})})
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", "default")
    return rope


def attention_window(config: dict[str, Any]) -> int | None:
    """Tokens that a layer sees back, where some layer's attention slides; llama.cpp's graphs of these families do not slide."""
    slides = config.get("use_sliding_window", config["model_type"] == "mistral")
    return config.get("sliding_window") if slides else None


def check_gguf(checkpoint: Checkpoint, *, type: str, embedding_type: str | None = None, head_type: str | None = None) -> None:
    """Refuse what cannot be written, before any work starts.

    Raises Incompatible (`key` names the parameter): an unknown type, codes that GGUF has no place for, a row width that is no multiple
    of the block, a family or a feature of it that llama.cpp lacks, a tokenizer that it does not know.
    """
    if type not in TYPES:
        raise Incompatible(f"GGUF type {type!r} is not known; known: {', '.join(TYPES)}", key="type")
    for key, chosen in (("embedding_type", embedding_type), ("head_type", head_type)):
        if chosen is not None and chosen not in WRITTEN:
            raise Incompatible(f"{key} {chosen!r} is not one of {', '.join(WRITTEN)}", key=key)
    _check_architecture(checkpoint)
    embedding, head = tensor_types(checkpoint, type=type, embedding_type=embedding_type, head_type=head_type)
    if checkpoint.tied and head != embedding:
        raise Incompatible(
            f"embedding and head are one tensor in this model, so head_type {head} cannot differ from embedding_type {embedding}",
            key="head_type",
        )
    for key, chosen in (("embedding_type", embedding), ("head_type", head)):
        if chosen == "q8_0" and checkpoint.hidden_size % BLOCK:
            raise Incompatible(f"{key} q8_0 needs rows of a multiple of {BLOCK}; hidden_size is {checkpoint.hidden_size}", key=key)
    _check_layout(checkpoint, type)
    if checkpoint.path.is_dir() and (checkpoint.path / "tokenizer.json").is_file():
        recognize(json.loads((checkpoint.path / "tokenizer.json").read_text()))


def _check_architecture(checkpoint: Checkpoint) -> None:
    config, model_type = checkpoint.config, checkpoint.model_type
    if model_type not in ARCHITECTURES:
        raise Incompatible(f"export.gguf does not write the architecture {model_type!r}; it writes {', '.join(ARCHITECTURES)}", key="uses")
    if config.get("hidden_act", "silu") != "silu":
        raise Incompatible(f"llama.cpp runs {model_type} with silu only; this model has hidden_act {config['hidden_act']!r}", key="uses")
    rope = rope_settings(config)
    known = ("default", "linear", "yarn", "llama3") if ARCHITECTURES[model_type] == "llama" else ("default", "linear", "yarn")
    unwritten = [key for key in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(key) is not None]
    if rope["rope_type"] not in known or rope.get("partial_rotary_factor", 1.0) != 1.0 or unwritten or not rope.get("truncate", True):
        raise Incompatible(
            f"the rope settings {rope} cannot be written for {model_type}; written are whole heads of type {', '.join(known)}, "
            "yarn with its own scaling of attention",
            key="uses",
        )
    if model_type == "qwen2" and config["num_attention_heads"] * checkpoint.head_dim != checkpoint.hidden_size:
        raise Incompatible("llama.cpp's qwen2 needs heads x head_dim = hidden_size; export this pruned model to ONNX instead", key="uses")
    if model_type == "qwen3" and config.get("attention_bias"):
        raise Incompatible("llama.cpp's qwen3 has no attention biases, and this model does; export it to ONNX instead", key="uses")


def _check_layout(checkpoint: Checkpoint, type: str) -> None:
    quantized = checkpoint.layout != "dense"
    if type == CARRY and not quantized:
        raise Incompatible(
            "there are no codes to carry in a dense checkpoint; put quantize.gptq or quantize.awq in front, or choose a type such as q8_0",
            key="type",
        )
    if quantized and type not in (CARRY, *FLOATS):
        raise Incompatible(
            f"type {type} would round this {checkpoint.layout} checkpoint a second time; {CARRY} keeps its codes", key="type"
        )
    if type == CARRY:
        _check_codes(checkpoint)
    elif type not in FLOATS:
        wrong = {name: width for name, (_, width) in checkpoint.linear_widths().items() if width % BLOCK}
        if wrong:
            raise Incompatible(
                f"{type} needs rows of a multiple of {BLOCK}; prune with multiple_of: {BLOCK}. Too narrow: {wrong}", key="type"
            )


def _check_codes(checkpoint: Checkpoint) -> None:
    settings = checkpoint.config["quantization_config"]
    if None in {layer_codes(settings, name.removesuffix(".weight")) for name in checkpoint.linear_tensors()}:
        raise Incompatible(
            "this checkpoint leaves layers as they were, so there are no codes of them to carry; choose a float type", key="type"
        )
    widths = {width for _, width in checkpoint.linear_widths().values()}
    for codes in sorted(codes_of(checkpoint), key=lambda codes: (codes.bits, codes.group_size)):
        if codes.bits not in CARRIED_BITS:
            raise Incompatible(
                f"codes of {codes.bits} bits have no place in GGUF; carried are {' and '.join(map(str, CARRIED_BITS))} bits", key="type"
            )
        if any(codes.width(width) % BLOCK for width in widths):
            raise Incompatible(
                f"group_size {codes.group_size} cannot be carried into GGUF's blocks of {BLOCK}; quantize with a multiple of {BLOCK}",
                key="type",
            )
    if any(codes.bits == 8 for codes in codes_of(checkpoint)) and not settings.get("sym", checkpoint.layout == "gptq"):
        raise Incompatible(
            "GGUF's q8_0 has no zero points, so asymmetric 8-bit codes cannot be carried; quantize with symmetric: true", key="type"
        )
    if settings.get("desc_act") and not settings.get("static_groups"):
        raise Incompatible(
            "act-order without static groups stores its groups out of order, and GGUF's are in order; quantize with static_groups: true",
            key="type",
        )
