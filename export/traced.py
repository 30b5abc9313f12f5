"""Sample inputs of a trace, and the config and tokenizer that accompany its graph; every tracing exporter uses them."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from compression.checkpoints.checkpoint import Checkpoint
from compression.checkpoints.loading import copy_tokenizer


def sample_inputs(model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return inputs to trace a causal model with, and which of their axes vary: batch, new tokens and cached tokens.

    The sample has two rows of several tokens after several cached ones: torch.export would fix axes of length 1. Layers with a sliding
    window keep their whole cache, and their mask hides the tokens before the window, so one length serves all layers. Naming the axes
    that vary (`dynamic_shapes` of torch.export) is faster than leaving every axis open.
    """
    model.config.use_cache = True
    cache = DynamicCache()  # without the config, whose windows would crop it
    with torch.no_grad():
        model(torch.arange(8).reshape(2, 4), past_key_values=cache)
    inputs = {"input_ids": torch.arange(6).reshape(2, 3), "position_ids": torch.arange(4, 7).repeat(2, 1), "past_key_values": cache}
    auto = torch.export.Dim.AUTO
    tokens, cached = {0: auto, 1: auto}, {0: auto, 2: auto}
    return inputs, {"input_ids": tokens, "position_ids": tokens, "past_key_values": [cached] * (2 * len(cache.layers))}


def copy_description(source: Checkpoint, out: Path, **changes: Any) -> None:
    """Write the dense model's `config.json` with these changes into `out`, and copy the tokenizer."""
    config = {key: value for key, value in source.config.items() if key != "quantization_config"} | changes
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    copy_tokenizer(source.path, out)
