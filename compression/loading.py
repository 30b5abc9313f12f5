"""Opening and saving checkpoints as torch modules, and their tokenizers."""

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from compression.checkpoint import open_checkpoint
from compression.errors import UnusableModel

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "tokenizer.model", "vocab.json", "merges.txt", "generation_config.json",
)  # fmt: skip


def load_model(path: Path, *, dtype: torch.dtype | None = torch.float32, device: str = "cpu") -> PreTrainedModel:
    """Open any checkpoint as a plain transformers model in evaluation mode; GPTQ and AWQ layouts are dequantized.

    dtype  of the weights; None keeps the checkpoint's own
    Raises UnusableModel for a directory that `open_checkpoint` refuses.
    """
    checkpoint = open_checkpoint(path)
    if checkpoint.layout != "dense":
        raise UnusableModel(f"{path}: layout {checkpoint.layout} cannot be opened yet", key="model")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto", local_files_only=True, use_safetensors=True, trust_remote_code=False)
    return model.to(device).eval()


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's own fast tokenizer."""
    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def save_model(model: PreTrainedModel, out: Path, *, like: Path, dtype: str | None = None) -> None:
    """Write a dense checkpoint into `out`: config, safetensors, and the tokenizer files of the checkpoint `like`, byte for byte.

    dtype  "float16", "bfloat16" or "float32"; None takes the dtype of `like`
    """
    dtype = dtype or open_checkpoint(like).dtype
    out.mkdir(parents=True, exist_ok=True)
    model.to(getattr(torch, dtype)).save_pretrained(out, max_shard_size="5GB")
    copy_tokenizer(like, out)


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy the tokenizer (and generation settings) of a checkpoint byte for byte."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
