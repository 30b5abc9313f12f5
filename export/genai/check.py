"""The settings of a GenAI package, and which checkpoints can become one. Imports no torch: planning uses it."""

from typing import Annotated, Literal

from pydantic import Field

from compression.checkpoints.checkpoint import Checkpoint
from compression.errors import Incompatible
from compression.settings import Settings
from export.checks import BLOCK_SIZES, AccuracyLevel, BlockSize, check_family, check_outer_types, check_rope, outer_types

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
GENAI_LACKS = {  # why its builder (0.18) cannot write them
    "olmo2": "its builder has no such model",
    "smollm3": "its builder fails on layers without a rotary embedding",
    "gemma3_text": "its builder does not read the rope settings that transformers 5 saves",
}
HEAD_MULTIPLE = 16  # ONNX Runtime's GroupQueryAttention rotates heads whose width is a multiple of this
_GENAI = "ONNX Runtime GenAI"

OuterType = Literal["float32", "float16", "int4"]


class GenaiSettings(Settings):
    """What a GenAI package is made of. A GPTQ or AWQ checkpoint keeps its codes, groups and zero points."""

    precision: Annotated[Literal["int4", "fp32", "fp16"], Field(description="Type of the weights of linear layers.")] = "int4"
    block_size: Annotated[BlockSize, Field(description="Weights that share a scale where a dense checkpoint is rounded here.")] = 32
    embedding_type: Annotated[OuterType | None, Field(description="Of the token embedding; default: the float type of the package.")] = None
    head_type: Annotated[OuterType | None, Field(description="As embedding_type, for the output head; a tied one is stored once.")] = None
    accuracy_level: Annotated[AccuracyLevel, Field(description="4 multiplies with int8 activations (faster), 1 with float32.")] = 4

    def outer_types(self, checkpoint: Checkpoint) -> tuple[str, str]:
        """Return the types of embedding and head."""
        return outer_types(checkpoint, self, "float16" if self.precision == "fp16" else "float32")


def check_genai(checkpoint: Checkpoint, settings: GenaiSettings) -> None:
    """Raise Incompatible where `export_genai` does not take this checkpoint with these settings; `key` names the parameter.

    It takes a GPTQ or AWQ checkpoint whose codes fit MatMulNBits as they are: 4 bits, groups of 16 to 256 in storage order.
    """
    _check_model(checkpoint)
    allowed = {"fp16": ("float16",), "fp32": ("float32",), "int4": ("float32", "int4")}[settings.precision]
    check_outer_types(settings, allowed, key="precision", value=settings.precision)
    settings.outer_types(checkpoint)
    if checkpoint.layout != "dense":
        _check_codes(checkpoint, settings.precision)


def _check_model(checkpoint: Checkpoint) -> None:
    model_type = checkpoint.model_type
    check_family(checkpoint, GENAI_FAMILIES, _GENAI, GENAI_LACKS.get(model_type))
    reason = "GenAI's builder does not write right for this architecture (export.gguf and export.onnx write more types)"
    check_rope(checkpoint, GENAI_ROPES[model_type], f"{_GENAI}, for {model_type},", reason)
    if checkpoint.head_dim % HEAD_MULTIPLE:
        raise Incompatible(
            f"{_GENAI} runs heads whose width is a multiple of {HEAD_MULTIPLE}, and this model's are {checkpoint.head_dim} wide; "
            "take export.onnx or export.gguf",
            key="uses",
        )
    _check_lengths(checkpoint)


def _check_lengths(checkpoint: Checkpoint) -> None:
    config, length, phi3 = checkpoint.config, checkpoint.max_length, checkpoint.model_type == "phi3"
    window = config.get("sliding_window")  # families without windows have no such key
    if window is not None and window < length:
        raise Incompatible(
            f"{_GENAI} fails on the sliding windows that its builder writes, and this model attends to {window} tokens of {length}; "
            f"set max_position_embeddings{' and original_max_position_embeddings' if phi3 else ''} to {window} in its config.json or take "
            "export.onnx or export.gguf",
            key="uses",
        )
    if phi3 and config["original_max_position_embeddings"] != length:
        raise Incompatible(
            f"GenAI's builder takes a phi3 whose original_max_position_embeddings ({config['original_max_position_embeddings']}) is not "
            f"max_position_embeddings ({length}) for one with longrope, and this one has none; set both to {length} in its config.json "
            "(without longrope the former means nothing) or take export.onnx or export.gguf",
            key="uses",
        )


def _check_codes(checkpoint: Checkpoint, precision: str) -> None:
    """Raise Incompatible for codes of a GPTQ or AWQ checkpoint that do not fit MatMulNBits."""
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
