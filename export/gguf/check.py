"""The settings of a GGUF file, and which checkpoints can become one. Imports no torch: planning uses it."""

from functools import lru_cache
from pathlib import Path
from typing import Annotated

from pydantic import Field

from compression.checkpoints.checkpoint import Checkpoint
from compression.checkpoints.quantization_config import layer_scheme, schemes_of
from compression.errors import Incompatible
from compression.settings import Settings
from export.checks import outer_types
from export.gguf.architectures import check_architecture
from export.gguf.tokenizer import read_vocabulary
from export.gguf.tokenizer_files import stamp_of
from export.gguf.types import BLOCK, CARRY, FLOATS, NEEDS_IMPORTANCE, QUANTIZED, TENSOR_TYPES, TYPES

CARRIED_BITS = (4, 8)
_REQUANTIZE = "or say requantize: true with a type such as q4_0, which rounds a second time"


class GgufSettings(Settings):
    """What a GGUF file is made of. Norms and biases are always float32."""

    type: Annotated[
        str,
        Field(
            examples=list(TYPES),
            description="f32, f16, bf16, q8_0, carry, or a type of llama.cpp's quantizer (q4_0, q4_k_m, q6_k, iq3_xxs, ...).",
        ),
    ] = "f16"
    embedding_type: Annotated[
        str | None,
        Field(description=f"{', '.join(TENSOR_TYPES)}; default: a float `type` itself, else the checkpoint's dtype."),
    ] = None
    head_type: Annotated[str | None, Field(description="As embedding_type, for the output head.")] = None
    importance: Annotated[
        bool,
        Field(
            description="Weigh the errors of llama.cpp's quantizer by the mean squares of each layer's inputs in the calibration data "
            "(its importance matrix); types below about 3 bits need it."
        ),
    ] = False
    requantize: Annotated[bool, Field(description="Round the weights of a GPTQ or AWQ checkpoint a second time, to another type.")] = False

    def outer_types(self, checkpoint: Checkpoint) -> tuple[str, str]:
        """Return the types of embedding and head."""
        own = {"float64": "f32", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}[checkpoint.dtype]
        return outer_types(checkpoint, self, self.type if self.type in FLOATS else own)


def check_gguf(checkpoint: Checkpoint, settings: GgufSettings) -> None:
    """Refuse what `export_gguf` cannot write, before any work starts.

    Raises:
        Incompatible: `key` names the parameter. The type is unknown, GGUF has no place for the codes, no row is a multiple of the block,
            llama.cpp lacks the family or a feature of it, it does not know the tokenizer, or a type needs an importance matrix.
    """
    if settings.type not in TYPES:
        raise Incompatible(f"GGUF type {settings.type!r} is not known; known: {', '.join(TYPES)}", key="type")
    check_architecture(checkpoint)
    _check_outer_types(checkpoint, settings)
    _check_layout(checkpoint, settings.type, settings.requantize)
    _check_importance(settings.type, settings.importance)
    if checkpoint.path.is_dir() and (checkpoint.path / "tokenizer.json").is_file():
        _check_vocabulary(checkpoint.path, checkpoint.vocab_size, stamp_of(checkpoint.path))


@lru_cache(maxsize=32)
def _check_vocabulary(path: Path, vocab_size: int, stamp: tuple[tuple[str, int, int], ...]) -> None:
    """Check a tokenizer once for all exports of a sweep: a large one takes seconds."""
    read_vocabulary(path, vocab_size)


def _check_outer_types(checkpoint: Checkpoint, settings: GgufSettings) -> None:
    for key, chosen in (("embedding_type", settings.embedding_type), ("head_type", settings.head_type)):
        if chosen is not None and chosen not in TENSOR_TYPES:
            raise Incompatible(f"{key} {chosen!r} is not one of {', '.join(TENSOR_TYPES)}", key=key)
    for key, type in zip(("embedding_type", "head_type"), settings.outer_types(checkpoint), strict=True):
        if checkpoint.hidden_size % TENSOR_TYPES[type]:
            raise Incompatible(
                f"{key} {type} needs rows of a multiple of {TENSOR_TYPES[type]}; hidden_size is {checkpoint.hidden_size}", key=key
            )


def _check_layout(checkpoint: Checkpoint, type: str, requantize: bool) -> None:
    quantized = checkpoint.layout != "dense"
    if type == CARRY and not quantized:
        raise Incompatible(
            "there are no codes to carry in a dense checkpoint; put quantize.gptq or quantize.awq in front, or choose a type such as q8_0",
            key="type",
        )
    if requantize and (not quantized or type in (CARRY, *FLOATS)):
        reason = f"type {type} rounds nothing a second time" if quantized else "a dense checkpoint was never rounded"
        raise Incompatible(f"{reason}, so leave requantize out", key="requantize")
    if quantized and not requantize and type not in (CARRY, *FLOATS):
        raise Incompatible(
            f"type {type} would round this {checkpoint.layout} checkpoint a second time; {CARRY} keeps its codes, and requantize: true permits the second rounding",
            key="type",
        )
    if type == CARRY:
        _check_codes(checkpoint)
    elif type not in FLOATS:
        widths = {name: width for name, (_, width) in checkpoint.linear_widths().items()}
        if all(width % BLOCK for width in widths.values()):
            raise Incompatible(
                f"{type} needs rows of a multiple of {BLOCK}, and no linear layer has such rows ({widths}), so all would stay in f16; prune with "
                f"multiple_of: {BLOCK} or say f16",
                key="type",
            )


def _check_importance(type: str, importance: bool) -> None:
    if importance and type not in QUANTIZED:
        raise Incompatible(f"an importance matrix weighs nothing in {type}; it is for the types {', '.join(QUANTIZED)}", key="importance")
    if type in NEEDS_IMPORTANCE and not importance:
        raise Incompatible(f"llama.cpp does not make {type} without an importance matrix; say importance: true", key="importance")


def _check_codes(checkpoint: Checkpoint) -> None:
    settings = checkpoint.config["quantization_config"]
    if None in {layer_scheme(settings, name.removesuffix(".weight")) for name in checkpoint.linear_tensors()}:
        raise Incompatible(
            f"this checkpoint leaves some layers as they were, and those have no codes to carry; choose a float type, {_REQUANTIZE}",
            key="type",
        )
    schemes = sorted(schemes_of(checkpoint), key=lambda scheme: (scheme.bits, scheme.group_size))
    for scheme in schemes:
        if scheme.bits not in CARRIED_BITS:
            raise Incompatible(
                f"codes of {scheme.bits} bits have no place in GGUF; carried are {' and '.join(map(str, CARRIED_BITS))} bits; "
                f"choose a float type, {_REQUANTIZE}",
                key="type",
            )
    if not _carries_any(checkpoint):
        sizes = ", ".join(sorted({str(scheme.group_size) for scheme in schemes}))
        raise Incompatible(
            f"group_size {sizes} cannot be carried into GGUF's blocks of {BLOCK}; quantize with a multiple of {BLOCK}, {_REQUANTIZE}",
            key="type",
        )
    if any(scheme.bits == 8 for scheme in schemes) and not settings.get("sym", checkpoint.layout == "gptq"):
        raise Incompatible(
            f"GGUF's q8_0 has no zero points, so asymmetric 8-bit codes cannot be carried; quantize with symmetric: true, {_REQUANTIZE}",
            key="type",
        )
    if settings.get("desc_act") and not settings.get("static_groups"):
        raise Incompatible(
            "act-order without static groups stores its groups out of order, and GGUF's are in order; quantize with static_groups: true, "
            f"{_REQUANTIZE}",
            key="type",
        )


def _carries_any(checkpoint: Checkpoint) -> bool:
    """Whether the groups of any linear layer are whole blocks. The other layers are written in f16."""
    settings, widths = checkpoint.config["quantization_config"], checkpoint.linear_widths()
    modules = [
        (f"{checkpoint.blocks}.{index}.{path}", width) for index in range(checkpoint.num_layers) for path, (_, width) in widths.items()
    ]
    schemes = [(layer_scheme(settings, module), width) for module, width in modules]
    return any(scheme is not None and scheme.width(width) % BLOCK == 0 for scheme, width in schemes)
