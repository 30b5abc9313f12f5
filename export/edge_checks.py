"""What the OpenVINO exporter takes, told from a checkpoint's description alone. Imports no torch."""

from typing import Literal

from compression.checkpoint import Checkpoint
from compression.errors import Incompatible

StoredType = Literal["float32", "float16", "int8"]
Role = Literal["linear", "embedding", "head"]

OPENVINO_FAMILIES = ("gemma3_text", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")
STORED_TYPES: tuple[StoredType, ...] = ("float32", "float16", "int8")
FIXED_ROPES = ("default", "linear", "llama3", "yarn")  # whose frequencies are the same for every length, as in a traced graph


def check_openvino(checkpoint: Checkpoint, *, dtype: str, embedding_type: str | None = None, head_type: str | None = None) -> None:
    """Raises Incompatible where `export_openvino` would not take this checkpoint."""
    if checkpoint.model_type not in OPENVINO_FAMILIES:
        raise Incompatible(
            f"the OpenVINO exporter is not proven for the architecture {checkpoint.model_type!r}; it takes {', '.join(OPENVINO_FAMILIES)}",
            key="uses",
        )
    for rope in _rope_types(checkpoint):
        if rope not in FIXED_ROPES:
            raise Incompatible(
                f"the OpenVINO exporter writes one graph for all lengths, and {rope!r} rope changes with the length; "
                f"it takes {', '.join(FIXED_ROPES)}",
                key="uses",
            )
    for key, chosen in (("dtype", dtype), ("embedding_type", embedding_type), ("head_type", head_type)):
        if chosen not in (*STORED_TYPES, *([] if key == "dtype" else [None])):
            raise Incompatible(f"the OpenVINO exporter does not write {chosen!r}; it writes {', '.join(STORED_TYPES)}", key=key)
    types = stored_types(checkpoint, dtype=dtype, embedding_type=embedding_type, head_type=head_type)
    if checkpoint.tied and types["head"] != types["embedding"]:
        raise Incompatible(
            f"embedding and head are one tensor in this model, so head_type {types['head']} cannot differ from "
            f"embedding_type {types['embedding']}",
            key="head_type",
        )


def stored_types(checkpoint: Checkpoint, *, dtype: str, embedding_type: str | None, head_type: str | None) -> dict[Role, str]:
    """Types of the matrices by role. None stands for `dtype` where that is a float type, else for the float type as wide as the checkpoint's."""
    default = dtype if dtype != "int8" else "float32" if checkpoint.dtype == "float32" else "float16"
    embedding = embedding_type or default
    return {"linear": dtype, "embedding": embedding, "head": head_type or (embedding if checkpoint.tied else default)}


def _rope_types(checkpoint: Checkpoint) -> set[str]:
    """Of `rope_parameters`, one or one for each type of layer, or of the older `rope_scaling`."""
    rope = checkpoint.config.get("rope_parameters") or checkpoint.config.get("rope_scaling") or {}
    layers = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    found = {layer.get("rope_type") or layer.get("type") or "default" for layer in layers}
    return {"longrope" if checkpoint.model_type == "phi3" and name in ("su", "yarn") else name for name in found}  # its first spellings
