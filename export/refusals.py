"""What several exporters refuse alike, told from a checkpoint's description alone. Imports no torch."""

from collections.abc import Iterator
from typing import Any

from compression.checkpoints.checkpoint import Checkpoint
from compression.errors import Incompatible, UnusableModel

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

# What the config classes of transformers always write. An exporter that took a default of its own for an absent one guessed wrong before.
_SETTINGS = (
    "tie_word_embeddings", "rope_parameters", "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
)  # fmt: skip
_SETTINGS_OF: dict[str, tuple[str, ...]] = {
    "llama": ("head_dim", "hidden_act", "attention_bias", "mlp_bias"),
    "mistral": ("head_dim", "hidden_act", "sliding_window"),
    "qwen2": ("hidden_act", "sliding_window", "layer_types"),
    "qwen3": ("head_dim", "hidden_act", "sliding_window", "layer_types", "attention_bias"),
    "smollm3": ("hidden_act", "sliding_window", "layer_types", "attention_bias", "mlp_bias", "no_rope_layers"),
    "olmo2": ("hidden_act", "attention_bias"),
    "gemma3_text": ("head_dim", "hidden_activation", "sliding_window", "layer_types", "attention_bias", "query_pre_attn_scalar"),
    "phi3": ("hidden_act", "sliding_window"),
}


def check_family(checkpoint: Checkpoint, families: tuple[str, ...], who: str, why: str | None = None) -> None:
    """Raises Incompatible for an architecture that is not among `families`; `why` tells the reason where it is known.

    Raises UnusableModel for a config without a setting of its class (`check_settings`).
    """
    if checkpoint.model_type not in families:
        reason = f" ({why})" if why else ""
        raise Incompatible(
            f"{who} is not proven for the architecture {checkpoint.model_type!r}{reason}; it takes {', '.join(families)}", key="uses"
        )
    check_settings(checkpoint)


def check_settings(checkpoint: Checkpoint) -> None:
    """Raises UnusableModel for a config that leaves out what the config class of its model type always writes."""
    if absent := [key for key in (*_SETTINGS, *_SETTINGS_OF[checkpoint.model_type]) if key not in checkpoint.config]:
        raise UnusableModel(
            f"the config of {checkpoint.path} has no {', '.join(absent)}, which transformers writes for the model type "
            f"{checkpoint.model_type!r}; open it with AutoConfig and save it again",
            key="model",
        )


def rope_setting(rope: dict[str, Any], key: str) -> Any:
    """A value of `rope_parameters`. Raises UnusableModel where it is absent."""
    if key not in rope:
        raise UnusableModel(f"the model's rope_parameters {rope} have no {key}, which transformers writes for this rope_type", key="model")
    return rope[key]


def ropes(checkpoint: Checkpoint) -> Iterator[dict[str, Any]]:
    """The `rope_parameters` of each type of layer that has its own, or the one set for all layers."""
    rope = checkpoint.config["rope_parameters"]
    layers = [value for value in rope.values() if isinstance(value, dict)]
    yield from layers or [rope]


def check_rope(checkpoint: Checkpoint, types: tuple[str, ...], who: str, why: str) -> None:
    """Raises Incompatible for a rotary embedding of another type than `types`.

    why  continues "this model's rotary embedding is of type 'x', which ..."
    """
    for rope in ropes(checkpoint):
        if (kind := rope_setting(rope, "rope_type")) not in types:
            raise Incompatible(
                f"this model's rotary embedding is of type {kind!r}, which {why}; {who} takes {', '.join(types)}", key="uses"
            )


def check_fixed_rope(checkpoint: Checkpoint, who: str) -> None:
    """Raises Incompatible for a rotary embedding that changes with the length of the text: a graph is traced at one length."""
    check_rope(checkpoint, FIXED_ROPES, who, "changes with the length of the text, and a graph is traced at one")


def check_tied_types(checkpoint: Checkpoint, embedding: str, head: str) -> None:
    """Raises Incompatible where embedding and head are one tensor and should be of two types."""
    if checkpoint.tied and embedding != head:
        raise Incompatible(
            f"embedding and head are one tensor in this model, so head_type {head} cannot differ from embedding_type {embedding}",
            key="head_type",
        )
