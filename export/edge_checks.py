"""What the OpenVINO and ExecuTorch exporters take, told from a checkpoint's description alone. Imports no torch."""

from typing import Literal

from compression.checkpoints.checkpoint import Checkpoint
from compression.errors import Incompatible
from export.refusals import TRACED_FAMILIES, check_family, check_fixed_rope, check_tied_types

StoredType = Literal["float32", "float16", "int8"]
Role = Literal["linear", "embedding", "head"]

STORED_TYPES: tuple[StoredType, ...] = ("float32", "float16", "int8")
EXECUTORCH_TYPES = ("float32",)
EXECUTORCH_CONTEXT = 2048  # tokens of the cache by default: all of it is in memory from the start


def check_openvino(checkpoint: Checkpoint, *, dtype: str, embedding_type: str | None = None, head_type: str | None = None) -> None:
    """Raises Incompatible where `export_openvino` would not take this checkpoint."""
    _check_graph(checkpoint, "the OpenVINO exporter")
    for key, chosen in (("dtype", dtype), ("embedding_type", embedding_type), ("head_type", head_type)):
        if chosen not in (*STORED_TYPES, *([] if key == "dtype" else [None])):
            raise Incompatible(f"the OpenVINO exporter does not write {chosen!r}; it writes {', '.join(STORED_TYPES)}", key=key)
    types = stored_types(checkpoint, dtype=dtype, embedding_type=embedding_type, head_type=head_type)
    check_tied_types(checkpoint, types["embedding"], types["head"])


def check_executorch(checkpoint: Checkpoint, *, dtype: str, max_length: int | None = None, chunk: int) -> None:
    """Raises Incompatible where `export_executorch` would not take this checkpoint."""
    _check_graph(checkpoint, "the ExecuTorch exporter")
    if dtype not in EXECUTORCH_TYPES:
        raise Incompatible(f"the ExecuTorch exporter does not write {dtype!r}; it writes {', '.join(EXECUTORCH_TYPES)}", key="dtype")
    length = cache_length(checkpoint, max_length)
    if not 16 <= length <= checkpoint.max_length:
        raise Incompatible(f"max_length {length} is not from 16 to the {checkpoint.max_length} tokens of this model", key="max_length")
    if chunk < 8:
        raise Incompatible(f"chunk {chunk} is less than 8 tokens", key="chunk")


def cache_length(checkpoint: Checkpoint, max_length: int | None) -> int:
    """Tokens that fit into a program of `export_executorch`. None stands for the model's context, `EXECUTORCH_CONTEXT` at most."""
    return min(checkpoint.max_length, EXECUTORCH_CONTEXT) if max_length is None else max_length


def stored_types(checkpoint: Checkpoint, *, dtype: str, embedding_type: str | None, head_type: str | None) -> dict[Role, str]:
    """Types of the matrices by role. None stands for `dtype` where that is a float type, else for the float type as wide as the checkpoint's."""
    default = dtype if dtype != "int8" else "float32" if checkpoint.dtype in ("float32", "float64") else "float16"
    embedding = embedding_type or default
    return {"linear": dtype, "embedding": embedding, "head": head_type or (embedding if checkpoint.tied else default)}


def _check_graph(checkpoint: Checkpoint, who: str) -> None:
    check_family(checkpoint, TRACED_FAMILIES, who)
    check_fixed_rope(checkpoint, who)
