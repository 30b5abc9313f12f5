"""Settings and checks that several exporters share. They read a checkpoint's description alone and import no torch."""

from collections.abc import Iterator
from typing import Any, Literal, Protocol, get_args

from compression.checkpoints.checkpoint import Checkpoint
from compression.errors import Incompatible, UnusableModel

# The families that every tracing exporter is tested with.
TRACED_FAMILIES = ("gemma3_text", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")
FIXED_ROPES = ("default", "linear", "llama3", "yarn")  # their angles depend on the position alone, as a traced graph needs

BlockSize = Literal[16, 32, 64, 128, 256]  # of MatMulNBits, ONNX Runtime's operator for 4-bit weights
BLOCK_SIZES: tuple[int, ...] = get_args(BlockSize)
AccuracyLevel = Literal[1, 4]

# The config classes of transformers always write these settings. An exporter that assumed a default for an absent one got it wrong.
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


class OuterTypes(Protocol):
    """Settings that choose the types of the matrices outside the decoder blocks."""

    @property
    def embedding_type(self) -> str | None: ...

    @property
    def head_type(self) -> str | None: ...


def outer_types(checkpoint: Checkpoint, settings: OuterTypes, default: str) -> tuple[str, str]:
    """Return the types of embedding and head: those of the settings, else `default`; a tied head follows the embedding.

    Raises:
        Incompatible: Embedding and head are one tensor, and the settings give them two types.
    """
    embedding = settings.embedding_type or default
    head = settings.head_type or (embedding if checkpoint.tied else default)
    if checkpoint.tied and embedding != head:
        raise Incompatible(
            f"embedding and head are one tensor in this model, so head_type {head} cannot differ from embedding_type {embedding}",
            key="head_type",
        )
    return embedding, head


def check_outer_types(settings: OuterTypes, allowed: tuple[str, ...], *, key: str, value: str) -> None:
    """Raise Incompatible for a type of embedding or head that does not go with the `value` of the parameter `key`."""
    for name, chosen in (("embedding_type", settings.embedding_type), ("head_type", settings.head_type)):
        if chosen is not None and chosen not in allowed:
            raise Incompatible(f"{name} {chosen!r} does not go with {key} {value}; {' or '.join(allowed)} does", key=name)


def check_traceable(checkpoint: Checkpoint, exporter: str) -> None:
    """Raise Incompatible for a model that no graph of one trace can express.

    Such are families that the exporters are not tested with, and rotary embeddings that change with the length of the text: a graph is
    traced at one length.
    """
    check_family(checkpoint, TRACED_FAMILIES, exporter)
    check_rope(checkpoint, FIXED_ROPES, exporter, "changes with the length of the text, and a graph is traced at one")


def check_family(checkpoint: Checkpoint, families: tuple[str, ...], exporter: str, reason: str | None = None) -> None:
    """Check the architecture of a checkpoint and that its config is complete.

    Raises:
        Incompatible: The architecture is not among `families`; `reason` says why, where that is known.
        UnusableModel: The config lacks a setting of its class (`check_settings`).
    """
    if checkpoint.model_type not in families:
        why = f" ({reason})" if reason else ""
        raise Incompatible(
            f"{exporter} is not proven for the architecture {checkpoint.model_type!r}{why}; it takes {', '.join(families)}", key="uses"
        )
    check_settings(checkpoint)


def check_settings(checkpoint: Checkpoint) -> None:
    """Raise UnusableModel for a config that lacks what the config class of its model type always writes."""
    if absent := [key for key in (*_SETTINGS, *_SETTINGS_OF[checkpoint.model_type]) if key not in checkpoint.config]:
        raise UnusableModel(
            f"the config of {checkpoint.path} has no {', '.join(absent)}, which transformers writes for the model type "
            f"{checkpoint.model_type!r}; open it with AutoConfig and save it again",
            key="model",
        )


def rope_setting(rope: dict[str, Any], key: str) -> Any:
    """Return a value of `rope_parameters`. Raise UnusableModel where it is absent."""
    if key not in rope:
        raise UnusableModel(f"the model's rope_parameters {rope} have no {key}, which transformers writes for this rope_type", key="model")
    return rope[key]


def check_rope(checkpoint: Checkpoint, types: tuple[str, ...], exporter: str, reason: str) -> None:
    """Raise Incompatible for a rotary embedding of another type than `types`.

    Args:
        checkpoint: The model.
        types: The types that the exporter writes.
        exporter: Its name in the message.
        reason: Continues the sentence "this model's rotary embedding is of type 'x', which ...".
    """
    for rope in _ropes(checkpoint):
        if (type := rope_setting(rope, "rope_type")) not in types:
            raise Incompatible(
                f"this model's rotary embedding is of type {type!r}, which {reason}; {exporter} takes {', '.join(types)}", key="uses"
            )


def _ropes(checkpoint: Checkpoint) -> Iterator[dict[str, Any]]:
    """Yield the `rope_parameters` of each type of layer that has its own, or the single set for all layers."""
    rope = checkpoint.config["rope_parameters"]
    layers = [value for value in rope.values() if isinstance(value, dict)]
    yield from layers or [rope]
