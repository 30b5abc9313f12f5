"""What tests of artifacts judge with."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig

from compression.checkpoints.checkpoint import Checkpoint
from compression.checkpoints.loading import load_model
from tests.tiny import tiny_checkpoint, tiny_windows


def kl(expected: np.ndarray, found: np.ndarray) -> float:
    """Mean KL divergence between the distributions of next tokens, in float64."""
    p, q = (torch.log_softmax(torch.from_numpy(logits).double(), -1) for logits in (expected, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


def contents(directory: Path) -> dict[str, bytes]:
    """The bytes of every file, by name."""
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def of_type(checkpoint: Checkpoint, model_type: str, **config: object) -> Checkpoint:
    """A planned checkpoint of another model type and of the same shape, with every setting that its config class writes."""
    shape = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    kept = {key: checkpoint.config[key] for key in (*shape, "max_position_embeddings", "tie_word_embeddings")}
    settings = AutoConfig.for_model(model_type, **kept, bos_token_id=0, eos_token_id=1, pad_token_id=1).to_diff_dict()
    return dataclasses.replace(checkpoint, config=settings | {"dtype": checkpoint.dtype} | config)


def model_of(folder: Path, family: str) -> Path:
    """A tiny checkpoint of the family: mistral and gemma3_text with a sliding window of 8, qwen2 with a head of its own."""
    window = {"sliding_window": 8} if family == "mistral" else {}
    return tiny_checkpoint(folder, family, layers=2 if family == "gemma3_text" else 1, tied=family != "qwen2", **window)


def greedy(checkpoint: Path, prompt: int, new: int) -> torch.Tensor:
    """A prompt and what transformers generates after it, without a cache: int64 [1, prompt + new]."""
    tokens, model = tiny_windows(1, prompt, seed=3), load_model(checkpoint)
    for _ in range(new):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    return tokens
