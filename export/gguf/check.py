"""Which checkpoints can become which GGUF file. Imports no torch: used while planning."""

from functools import lru_cache
from pathlib import Path

from compression.checkpoints.checkpoint import Checkpoint
from compression.checkpoints.quantization_config import layer_scheme, schemes_of
from compression.errors import Incompatible
from export.gguf.architectures import check_architecture
from export.gguf.tokenizer import read_vocabulary
from export.gguf.tokenizer_files import stamp_of
from export.gguf.types import BLOCK, CARRY, FLOATS, NEEDS_IMPORTANCE, QUANTIZED, TENSOR_TYPES, TYPES, tensor_types
from export.refusals import check_tied_types

CARRIED_BITS = (4, 8)
_OPENLY = "or say requantize: true with a type such as q4_0, which rounds a second time"


def check_gguf(
    checkpoint: Checkpoint, *, type: str, embedding_type: str | None = None, head_type: str | None = None,
    requantize: bool = False, importance: bool = False,
) -> None:  # fmt: skip
    """Refuse what cannot be written, before any work starts.

    Raises Incompatible (`key` names the parameter): an unknown type, codes that GGUF has no place for, rows none of which is a multiple
    of the block, a family or a feature of it that llama.cpp lacks, a tokenizer that it does not know, a type that needs an importance
    matrix without one.
    """
    if type not in TYPES:
        raise Incompatible(f"GGUF type {type!r} is not known; known: {', '.join(TYPES)}", key="type")
    check_architecture(checkpoint)
    _check_outer_types(checkpoint, type, embedding_type, head_type)
    _check_layout(checkpoint, type, requantize)
    _check_importance(type, importance)
    if checkpoint.path.is_dir() and (checkpoint.path / "tokenizer.json").is_file():
        _check_vocabulary(checkpoint.path, checkpoint.vocab_size, stamp_of(checkpoint.path))


@lru_cache(maxsize=32)
def _check_vocabulary(path: Path, vocab_size: int, stamp: tuple[tuple[str, int, int], ...]) -> None:
    """Once for the exports of a sweep: a large tokenizer takes seconds."""
    read_vocabulary(path, vocab_size)


def _check_outer_types(checkpoint: Checkpoint, type: str, embedding_type: str | None, head_type: str | None) -> None:
    for key, chosen in (("embedding_type", embedding_type), ("head_type", head_type)):
        if chosen is not None and chosen not in TENSOR_TYPES:
            raise Incompatible(f"{key} {chosen!r} is not one of {', '.join(TENSOR_TYPES)}", key=key)
    embedding, head = tensor_types(checkpoint, type=type, embedding_type=embedding_type, head_type=head_type)
    check_tied_types(checkpoint, embedding, head)
    for key, chosen in (("embedding_type", embedding), ("head_type", head)):
        if checkpoint.hidden_size % TENSOR_TYPES[chosen]:
            raise Incompatible(
                f"{key} {chosen} needs rows of a multiple of {TENSOR_TYPES[chosen]}; hidden_size is {checkpoint.hidden_size}", key=key
            )


def _check_layout(checkpoint: Checkpoint, type: str, requantize: bool) -> None:
    quantized = checkpoint.layout != "dense"
    if type == CARRY and not quantized:
        raise Incompatible(
            "there are no codes to carry in a dense checkpoint; put quantize.gptq or quantize.awq in front, or choose a type such as q8_0",
            key="type",
        )
    if requantize and (not quantized or type in (CARRY, *FLOATS)):
        what = f"type {type} rounds nothing a second time" if quantized else "a dense checkpoint was never rounded"
        raise Incompatible(f"{what}, so leave requantize out", key="requantize")
    if quantized and not requantize and type not in (CARRY, *FLOATS):
        raise Incompatible(
            f"type {type} would round this {checkpoint.layout} checkpoint a second time; {CARRY} keeps its codes, and requantize: true says it openly",
            key="type",
        )
    if type == CARRY:
        _check_codes(checkpoint)
    elif type not in FLOATS:
        widths = {name: width for name, (_, width) in checkpoint.linear_widths().items()}
        if all(width % BLOCK for width in widths.values()):
            raise Incompatible(
                f"{type} needs rows of a multiple of {BLOCK}, and no linear layer has such ({widths}), so all would stay in f16; prune with "
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
            f"this checkpoint leaves layers as they were, so there are no codes of them to carry; choose a float type, {_OPENLY}",
            key="type",
        )
    for codes in sorted(schemes_of(checkpoint), key=lambda codes: (codes.bits, codes.group_size)):
        if codes.bits not in CARRIED_BITS:
            raise Incompatible(
                f"codes of {codes.bits} bits have no place in GGUF; carried are {' and '.join(map(str, CARRIED_BITS))} bits; "
                f"choose a float type, {_OPENLY}",
                key="type",
            )
    if not _carries_any(checkpoint):
        sizes = ", ".join(sorted({str(codes.group_size) for codes in schemes_of(checkpoint)}))
        raise Incompatible(
            f"group_size {sizes} cannot be carried into GGUF's blocks of {BLOCK}; quantize with a multiple of {BLOCK}, {_OPENLY}",
            key="type",
        )
    if any(codes.bits == 8 for codes in schemes_of(checkpoint)) and not settings.get("sym", checkpoint.layout == "gptq"):
        raise Incompatible(
            f"GGUF's q8_0 has no zero points, so asymmetric 8-bit codes cannot be carried; quantize with symmetric: true, {_OPENLY}",
            key="type",
        )
    if settings.get("desc_act") and not settings.get("static_groups"):
        raise Incompatible(
            "act-order without static groups stores its groups out of order, and GGUF's are in order; quantize with static_groups: true, "
            f"{_OPENLY}",
            key="type",
        )


def _carries_any(checkpoint: Checkpoint) -> bool:
    """Whether the groups of any linear layer are whole blocks; layers whose are not are written in f16."""
    settings, widths = checkpoint.config["quantization_config"], checkpoint.linear_widths()
    modules = [
        (f"{checkpoint.blocks}.{index}.{path}", width) for index in range(checkpoint.num_layers) for path, (_, width) in widths.items()
    ]
    found = [(layer_scheme(settings, module), width) for module, width in modules]
    return any(codes is not None and codes.width(width) % BLOCK == 0 for codes, width in found)
