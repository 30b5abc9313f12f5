"""What the ONNX exporters take, told from a checkpoint's description alone. Imports no torch, so recipes are checked in milliseconds."""

from compression.checkpoints.checkpoint import Checkpoint
from compression.checkpoints.quantization_config import schemes_of
from compression.errors import Incompatible
from export.refusals import TRACED_FAMILIES, check_family, check_fixed_rope, check_rope, check_tied_types

# The families that GenAI's builder (0.18) writes, with the rope types that it writes right, found by comparing logits: it drops linear
# scaling of llama, and for the others divides by zero in yarn and has no llama3.
GENAI_ROPES: dict[str, tuple[str, ...]] = {
    "llama": ("default", "llama3"),
    "mistral": ("default", "linear"),
    "qwen2": ("default", "linear"),
    "qwen3": ("default", "linear"),
    "phi3": ("default",),
}
GENAI_FAMILIES = tuple(GENAI_ROPES)
GENAI_HEAD_WIDTH = 16  # what ONNX Runtime's GroupQueryAttention wants a head that it rotates to be a multiple of
GENAI_LACKS = {  # why its builder (0.18) cannot write them
    "olmo2": "its builder has no such model",
    "smollm3": "its builder fails on layers without a rotary embedding",
    "gemma3_text": "its builder does not read the rope settings that transformers 5 saves",
}
ONNX_TARGETS = ("portable", "onnxruntime")
ONNX_DTYPES = ("float32", "float16", "int8", "int8-static", "int4")
GENAI_PRECISIONS = ("int4", "fp32", "fp16")
BLOCK_SIZES = (16, 32, 64, 128, 256)  # of ONNX Runtime's MatMulNBits
ACCURACY_LEVELS = (1, 4)


def check_onnx(
    checkpoint: Checkpoint, *, target: str = "portable", dtype: str = "float32", block_size: int = 32, accuracy_level: int = 4,
    embedding_type: str | None = None, head_type: str | None = None,
) -> None:  # fmt: skip
    """Raises Incompatible where `export_onnx` would not take this checkpoint."""
    check_family(checkpoint, TRACED_FAMILIES, "the ONNX exporter")
    check_fixed_rope(checkpoint, "the ONNX exporter")
    for key, value, known in (("target", target, ONNX_TARGETS), ("dtype", dtype, ONNX_DTYPES)):
        if value not in known:
            raise Incompatible(f"the ONNX exporter has no {key} {value!r}; it has {', '.join(known)}", key=key)
    outer = ("float16",) if dtype == "float16" else ("float32", "int8")
    _check_outer_types(checkpoint, ("dtype", dtype), outer, embedding_type, head_type)
    if checkpoint.layout == "w8a8" and not dtype.startswith("int8"):
        raise Incompatible(
            f"a W8A8 checkpoint means 8-bit inputs of its layers, which a graph of type {dtype} would not have; choose int8 or int8-static",
            key="dtype",
        )
    if dtype != "int4":
        return
    if target != "onnxruntime":
        raise Incompatible("int4 is MatMulNBits, an operator of ONNX Runtime's own: it needs target: onnxruntime", key="target")
    _check_blocks(block_size, accuracy_level)
    if checkpoint.layout == "dense":
        wrong = {path: width for path, (_, width) in checkpoint.linear_widths().items() if width % block_size}
        if wrong:
            raise Incompatible(f"block_size {block_size} does not divide the width of {wrong}; prune to a multiple of it", key="block_size")
    else:
        _check_carried(checkpoint)


def outer_types(checkpoint: Checkpoint, *, type: str, embedding_type: str | None, head_type: str | None) -> tuple[str, str]:
    """Types of embedding and head. None stands for the float type of the graph or package, and for a tied head for the embedding's.

    type  the `dtype` of an ONNX graph, or the `precision` of a GenAI package
    """
    default = "float16" if type in ("float16", "fp16") else "float32"
    embedding = embedding_type or default
    return embedding, head_type or (embedding if checkpoint.tied else default)


def _check_outer_types(
    checkpoint: Checkpoint, chosen: tuple[str, str], known: tuple[str, ...], embedding_type: str | None, head_type: str | None
) -> None:
    """`chosen` is the name of the key that decides the float type, and its value."""
    key, type = chosen
    for name, outer in (("embedding_type", embedding_type), ("head_type", head_type)):
        if outer is not None and outer not in known:
            raise Incompatible(f"{name} {outer!r} does not go with {key} {type}; {' or '.join(known)} does", key=name)
    check_tied_types(checkpoint, *outer_types(checkpoint, type=type, embedding_type=embedding_type, head_type=head_type))


def _check_carried(checkpoint: Checkpoint) -> None:
    """Whether the codes of a GPTQ or AWQ checkpoint fit MatMulNBits."""
    if checkpoint.config["quantization_config"].get("desc_act"):
        raise Incompatible("MatMulNBits has groups in storage order only, and this checkpoint's are not (desc_act)", key="dtype")
    widths = {width for _, width in checkpoint.linear_widths().values()}
    for codes in schemes_of(checkpoint):
        if codes.bits != 4 or any(codes.width(width) not in BLOCK_SIZES for width in widths):
            raise Incompatible(
                f"MatMulNBits carries codes of 4 bits in groups of {', '.join(map(str, BLOCK_SIZES))}; this {checkpoint.layout.upper()} "
                f"checkpoint has {codes.bits} bits in groups of {codes.group_size}",
                key="dtype",
            )


def _check_blocks(block_size: int, accuracy_level: int) -> None:
    if block_size not in BLOCK_SIZES:
        raise Incompatible(f"MatMulNBits takes blocks of {', '.join(map(str, BLOCK_SIZES))}, not {block_size}", key="block_size")
    if accuracy_level not in ACCURACY_LEVELS:
        raise Incompatible(
            f"accuracy_level is 4 (activations in int8, faster) or 1 (in float32), not {accuracy_level}", key="accuracy_level"
        )


def check_genai(
    checkpoint: Checkpoint, *, precision: str, block_size: int = 32, embedding_type: str | None = None, head_type: str | None = None,
    accuracy_level: int = 4,
) -> None:  # fmt: skip
    """Raises Incompatible where `export_genai` would not take this checkpoint.

    A GPTQ or AWQ checkpoint is taken where its codes fit MatMulNBits as they are: 4 bits, groups of 16 to 256 in storage order.
    """
    _check_genai_family(checkpoint)
    if precision not in GENAI_PRECISIONS:
        raise Incompatible(f"GenAI packages are written in {', '.join(GENAI_PRECISIONS)}, not in {precision!r}", key="precision")
    _check_blocks(block_size, accuracy_level)
    outer = {"fp16": ("float16",), "fp32": ("float32",), "int4": ("float32", "int4")}[precision]
    _check_outer_types(checkpoint, ("precision", precision), outer, embedding_type, head_type)
    if checkpoint.layout != "dense":
        _check_codes(checkpoint, precision)


def _check_genai_family(checkpoint: Checkpoint) -> None:
    who = "ONNX Runtime GenAI"
    check_family(checkpoint, GENAI_FAMILIES, who, GENAI_LACKS.get(checkpoint.model_type))
    why = "GenAI's builder does not write right for this architecture (export.gguf and export.onnx write more types)"
    check_rope(checkpoint, GENAI_ROPES[checkpoint.model_type], f"{who}, for {checkpoint.model_type},", why)
    if checkpoint.head_dim % GENAI_HEAD_WIDTH:
        raise Incompatible(
            f"{who} runs heads whose width is a multiple of {GENAI_HEAD_WIDTH}, and this model's are {checkpoint.head_dim} wide; "
            "take export.onnx or export.gguf",
            key="uses",
        )
    _check_genai_lengths(checkpoint, who)


def _check_genai_lengths(checkpoint: Checkpoint, who: str) -> None:
    config, length = checkpoint.config, checkpoint.max_length
    both = " and original_max_position_embeddings" if checkpoint.model_type == "phi3" else ""
    window = config.get("sliding_window")  # of the families without one the key is absent
    if window is not None and window < length:
        raise Incompatible(
            f"{who} fails on the sliding windows that its builder writes, and this model attends to {window} tokens of "
            f"{length}; set max_position_embeddings{both} to {window} in its config.json or take export.onnx or export.gguf",
            key="uses",
        )
    if both and config["original_max_position_embeddings"] != length:
        raise Incompatible(
            f"GenAI's builder takes a phi3 whose original_max_position_embeddings ({config['original_max_position_embeddings']}) is not "
            f"max_position_embeddings ({length}) for one with longrope, which this is not; set both to {length} in its config.json (without "
            "longrope the first means nothing) or take export.onnx or export.gguf",
            key="uses",
        )


def _check_codes(checkpoint: Checkpoint, precision: str) -> None:
    """Whether the codes of a GPTQ or AWQ checkpoint can be carried into MatMulNBits."""
    quantization, layout = checkpoint.config["quantization_config"], checkpoint.layout.upper()
    if precision != "int4":
        raise Incompatible(
            f"a {layout} checkpoint keeps its 4-bit codes in a GenAI package: precision must be int4, not {precision}; "
            "export.onnx dequantizes instead",
            key="precision",
        )
    if quantization.get("desc_act", False) or quantization.get("checkpoint_format", "gptq") != "gptq":
        raise Incompatible(
            f"GenAI carries {layout} codes whose groups are in storage order (desc_act false) and whose format is gptq; "
            "quantize.gptq writes such",
            key="uses",
        )
    if quantization.get("dynamic"):
        raise Incompatible(
            f"GenAI carries {layout} codes of one width only, and this checkpoint mixes them; export.gguf takes others", key="uses"
        )
    bits, group_size = quantization["bits"], quantization["group_size"]
    if bits != 4:
        raise Incompatible(
            f"GenAI carries 4-bit codes only, and this {layout} checkpoint has {bits} bits; export.gguf takes others", key="uses"
        )
    if group_size not in BLOCK_SIZES:
        raise Incompatible(
            f"GenAI carries codes in groups of {', '.join(map(str, BLOCK_SIZES))}; this {layout} checkpoint has group_size {group_size}",
            key="uses",
        )
