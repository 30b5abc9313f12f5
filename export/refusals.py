"""What several exporters refuse alike, told from a checkpoint's description alone. Imports no torch."""

from compression.checkpoint import Checkpoint
from compression.errors import Incompatible

TRACED_FAMILIES = (
    "gemma3_text",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)  # proven with every exporter that traces
FIXED_ROPES = ("default", "linear", "llama3", "yarn")  # whose angles are a function of the position alone, as in a traced graph


def check_family(checkpoint: Checkpoint, families: tuple[str, ...], who: str, why: str | None = None) -> None:
    """Raises Incompatible for an architecture that is not among `families`; `why` tells the reason where it is known."""
    if checkpoint.model_type not in families:
        reason = f" ({why})" if why else ""
        raise Incompatible(
            f"{who} is not proven for the architecture {checkpoint.model_type!r}{reason}; it takes {', '.join(families)}", key="uses"
        )


def check_fixed_rope(checkpoint: Checkpoint, who: str) -> None:
    """Raises Incompatible for a rotary embedding that changes with the length of the text: a graph is traced at one length."""
    rope = checkpoint.config.get("rope_parameters") or checkpoint.config.get("rope_scaling") or {}
    layers = [value for value in rope.values() if isinstance(value, dict)] or [rope]  # of each type of layer, or of all
    early = {"su": "longrope", "yarn": "longrope"} if checkpoint.model_type == "phi3" else {}  # names that it had there
    for told in (layer.get("rope_type") or layer.get("type") or "default" for layer in layers):
        kind = early.get(told, told)
        if kind not in FIXED_ROPES:
            raise Incompatible(
                f"this model's rotary embedding is of type {kind!r}, which changes with the length of the text, and a graph is traced at one; "
                f"{who} takes {', '.join(FIXED_ROPES)}",
                key="uses",
            )


def check_tied_types(checkpoint: Checkpoint, embedding: str, head: str) -> None:
    """Raises Incompatible where embedding and head are one tensor and should be of two types."""
    if checkpoint.tied and embedding != head:
        raise Incompatible(
            f"embedding and head are one tensor in this model, so head_type {head} cannot differ from embedding_type {embedding}",
            key="head_type",
        )
