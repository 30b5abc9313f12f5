"""The config of a model that neurons, heads or blocks have left. Imports no torch: planning uses it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from compression.checkpoints.checkpoint import Checkpoint
from compression.errors import Incompatible
from compression.pruning.settings import DepthSettings, Heads, WidthSettings

# Config entries that hold a value for every block
_BY_BLOCK = {
    "gemma3_text": ("layer_types",),
    "qwen2": ("layer_types",),
    "qwen3": ("layer_types",),
    "smollm3": ("layer_types", "no_rope_layers"),
}  # fmt: skip

# Their config classes refuse any other number of heads (validate_architecture), though head_dim makes it well defined.
_HEADS_DIVIDE_HIDDEN_SIZE = frozenset({"llama", "gemma3_text"})


def head_counts(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the numbers of query heads and key/value heads of a config."""
    queries = config["num_attention_heads"]
    return queries, config.get("num_key_value_heads") or queries


def pruned_width(intermediate_size: int, keep: float, multiple_of: int) -> int:
    """Return the multiple of `multiple_of` (one or more) that is nearest to the share `keep` of `intermediate_size` neurons; halves round up.

    Raises:
        Incompatible: No multiple fits (key "multiple_of").
    """
    if multiple_of > intermediate_size:
        raise Incompatible(f"multiple_of {multiple_of} does not fit an MLP of {intermediate_size} neurons", key="multiple_of")
    multiples = math.floor(intermediate_size * keep / multiple_of + 0.5)
    return min(max(multiples, 1), intermediate_size // multiple_of) * multiple_of


def width_config(checkpoint: Checkpoint, settings: WidthSettings) -> dict[str, Any]:
    """Return the config of a checkpoint that keeps the settings' shares of MLP neurons (`pruned_width`) and query heads (`pruned_heads`).

    A share of 1 keeps all, whatever their number. With fewer heads head_dim is written out, since hidden_size / num_attention_heads no
    longer gives it.

    Raises:
        Incompatible: `key` names the parameter.
        UnusableModel: An unlisted family.
    """
    assert checkpoint.family  # an unlisted one may call its widths otherwise
    kept: dict[str, Any] = {"intermediate_size": checkpoint.intermediate_size}
    if settings.keep != 1:
        kept["intermediate_size"] = pruned_width(checkpoint.intermediate_size, settings.keep, settings.multiple_of)
    if settings.keep_heads != 1:
        queries, groups = pruned_heads(checkpoint, settings.keep_heads, settings.heads)
        kept |= {"num_attention_heads": queries, "num_key_value_heads": groups, "head_dim": checkpoint.head_dim}
    return checkpoint.config | kept


def pruned_heads(checkpoint: Checkpoint, keep_heads: float, heads: Heads) -> tuple[int, int]:
    """Return the numbers of query heads and key/value heads that are nearest to the share `keep_heads` of the query heads.

    Args:
        checkpoint: The model whose heads leave.
        keep_heads: Share of the query heads, above 0 and at most 1. At least one stays; halves round up.
        heads: "groups": a key/value head leaves together with the query heads that read it. "queries": every key/value head stays, and
            loses the same number of its query heads.

    Raises:
        Incompatible: The model's heads cannot leave in this way, or transformers would not open the number that is left.
    """
    model, (queries, groups) = checkpoint.model_type, head_counts(checkpoint.config)
    per_group = queries // groups
    if heads == "queries" and per_group == 1:
        raise Incompatible(
            f"each of the {groups} key/value heads of {checkpoint.path} is read by one query head, so none can leave alone; "
            "heads: groups removes both",
            key="heads",
        )
    _refuse_scaled_rotation(checkpoint)
    choices = (
        [(per_group * n, n) for n in range(1, groups + 1)] if heads == "groups" else [(groups * n, groups) for n in range(1, per_group + 1)]
    )
    # Halves round up, as in `pruned_width`
    chosen = choices[max(math.floor(len(choices) * keep_heads + 0.5), 1) - 1]
    if model in _HEADS_DIVIDE_HIDDEN_SIZE and checkpoint.hidden_size % chosen[0]:
        working = [n / queries for n, _ in choices if checkpoint.hidden_size % n == 0]
        raise Incompatible(
            f"keep_heads {keep_heads} leaves {chosen[0]} of {queries} query heads, and transformers opens a {model} model only where their number "
            f"divides hidden_size ({checkpoint.hidden_size}); shares that work: {', '.join(f'{share:.4g}' for share in working)}",
            key="keep_heads",
        )
    return chosen


def _refuse_scaled_rotation(checkpoint: Checkpoint) -> None:
    """Phi3Config wants a factor for every rotary frequency, and counts these as hidden_size / heads / 2 whatever head_dim says."""
    rotation = checkpoint.config.get("rope_parameters") or {}
    if checkpoint.model_type == "phi3" and ("short_factor" in rotation or "long_factor" in rotation):
        raise Incompatible(
            f"{checkpoint.path} scales its rotary frequencies one by one (longrope), and transformers opens such a phi3 model only with "
            "hidden_size / head_dim heads; prune its neurons (keep) or blocks (prune.depth) instead",
            key="keep_heads",
        )


def blocks_left(checkpoint: Checkpoint, settings: DepthSettings) -> int:
    """Return how many blocks remain, one or more; a share is rounded to the nearest number, halves up.

    Raises:
        Incompatible: Not exactly one of `drop`, `keep` and `blocks` is set, or it does not fit the number of blocks; `key` names it.
    """
    drop, keep, blocks = settings.drop, settings.keep, settings.blocks
    if sum(value is not None for value in (drop, keep, blocks)) != 1:
        raise Incompatible("give one of drop (how many blocks leave), keep (the share that stays) and blocks (which leave)", key="drop")
    total = checkpoint.num_layers
    if drop is not None and drop >= total:
        raise Incompatible(f"drop {drop} leaves none of {total} blocks; it lies from 1 to {total - 1}", key="drop")
    if blocks is not None and (not blocks or set(blocks) >= set(range(total)) or len(set(blocks)) < len(blocks)):
        raise Incompatible(f"blocks {list(blocks)} is empty, names a block twice, or names all {total}", key="blocks")
    wrong = [block for block in blocks or () if not 0 <= block < total]
    if wrong:
        raise Incompatible(f"blocks names {wrong}, and {checkpoint.path} has blocks 0 to {total - 1}", key="blocks")
    if keep is not None:
        return max(math.floor(total * keep + 0.5), 1)
    return total - (drop or len(blocks or ()))


def depth_config(checkpoint: Checkpoint, kept: Sequence[int]) -> dict[str, Any]:
    """Return the config of a checkpoint with only the blocks `kept` (ascending), each with its own entries of the config.

    Raises:
        UnusableModel: An unlisted family.
    """
    assert checkpoint.family  # the blocks of an unlisted one may differ in ways that are not known here
    config = dict(checkpoint.config)
    for name in _BY_BLOCK.get(checkpoint.model_type, ()):
        if checkpoint.setting(name) is not None:
            config[name] = [config[name][block] for block in kept]
    if config.get("max_window_layers") is not None:  # the blocks below it attend to everything, the others to a window
        config["max_window_layers"] = sum(block < config["max_window_layers"] for block in kept)
    return config | {"num_hidden_layers": len(kept)}
