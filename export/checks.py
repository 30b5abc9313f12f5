"""What the ONNX exporters take, told from a checkpoint's description alone. Imports no torch, so recipes are checked in milliseconds."""

from compression.checkpoint import Checkpoint
from compression.errors import Incompatible

ONNX_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
GENAI_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ONNX_DTYPES = ("float32", "float16", "int8")
GENAI_PRECISIONS = ("int4", "fp32", "fp16")
BLOCK_SIZES = (16, 32, 64, 128, 256)  # of ONNX Runtime's MatMulNBits
ACCURACY_LEVELS = (1, 4)


def check_onnx(checkpoint: Checkpoint, *, dtype: str) -> None:
    """Raises Incompatible where `export_onnx` would not take this checkpoint."""
    _check_family(checkpoint, ONNX_FAMILIES, "the ONNX exporter")
    if dtype not in ONNX_DTYPES:
        raise Incompatible(f"the ONNX exporter does not write {dtype!r}; it writes {', '.join(ONNX_DTYPES)}", key="dtype")


def check_genai(
    checkpoint: Checkpoint, *, precision: str, block_size: int = 32, quantize_embeddings: bool = False, accuracy_level: int = 4
) -> None:
    """Raises Incompatible where `export_genai` would not take this checkpoint.

    A GPTQ or AWQ checkpoint is taken where its codes fit MatMulNBits as they are: 4 bits, groups of 16 to 256 in storage order.
    """
    _check_family(checkpoint, GENAI_FAMILIES, "ONNX Runtime GenAI's builder")
    if precision not in GENAI_PRECISIONS:
        raise Incompatible(f"GenAI packages are written in {', '.join(GENAI_PRECISIONS)}, not in {precision!r}", key="precision")
    if block_size not in BLOCK_SIZES:
        raise Incompatible(f"MatMulNBits takes blocks of {', '.join(map(str, BLOCK_SIZES))}, not {block_size}", key="block_size")
    if accuracy_level not in ACCURACY_LEVELS:
        raise Incompatible(
            f"accuracy_level is 4 (activations in int8, faster) or 1 (in float32), not {accuracy_level}", key="accuracy_level"
        )
    if quantize_embeddings and precision != "int4":
        raise Incompatible(f"embeddings are quantized only with precision int4, not with {precision}", key="quantize_embeddings")
    if checkpoint.layout != "dense":
        _check_codes(checkpoint, precision)


def _check_family(checkpoint: Checkpoint, families: tuple[str, ...], who: str) -> None:
    if checkpoint.model_type not in families:
        raise Incompatible(
            f"{who} is not proven for the architecture {checkpoint.model_type!r}; it takes {', '.join(families)}", key="uses"
        )
    window = checkpoint.config.get("sliding_window")
    if window is not None and checkpoint.config.get("use_sliding_window", True) and window < checkpoint.max_length:
        raise Incompatible(
            f"{who} has no sliding window, and this model attends to {window} tokens of {checkpoint.max_length}; "
            f"lower max_position_embeddings to {window} or export it with export.gguf",
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
