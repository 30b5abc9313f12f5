"""Open and save checkpoints as torch modules, and their tokenizers."""

import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from compression.checkpoints.checkpoint import COMPRESSED_TENSORS, Checkpoint, open_checkpoint, tokenizer_files, weight_map
from compression.checkpoints.compressed_tensors import read_scaled_linears, round_inputs
from compression.checkpoints.layouts import read_quantized_linears
from compression.checkpoints.schemes import read_scheme
from compression.checkpoints.shards import check_names, read_tensors
from compression.errors import UnusableModel, first_of


def load_model(
    path: Path, *, dtype: torch.dtype | None = torch.float32, device: str = "cpu", inputs_rounded: bool = True
) -> PreTrainedModel:
    """Open any checkpoint as a plain transformers model in evaluation mode; quantized layouts are dequantized.

    The linear layers of a W8A8 or fp8 checkpoint also round their inputs, token by token (`round_inputs`), as these formats mean.

    Args:
        path: A checkpoint directory.
        dtype: Of the weights; None keeps the checkpoint's own.
        device: A torch device string.
        inputs_rounded: False leaves the inputs of W8A8 and fp8 layers as they are, for callers that round them differently.

    Raises:
        UnusableModel: `open_checkpoint` refuses the directory, or tensors are missing or unknown to the model's class.
    """
    path = Path(path)
    checkpoint = open_checkpoint(path)
    if checkpoint.layout != "dense":
        model = _load_dequantized(checkpoint, dtype or getattr(torch, checkpoint.dtype), inputs_rounded)
    else:
        causal: Any = AutoModelForCausalLM  # annotated without the second value
        model, found = causal.from_pretrained(
            path, dtype=dtype or "auto", local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        check_tensors(model, path, missing=found["missing_keys"], unknown=found["unexpected_keys"])
    torch.nn.Module.to(model, device)
    return model.eval()


def _load_dequantized(checkpoint: Checkpoint, dtype: torch.dtype, inputs_rounded: bool) -> PreTrainedModel:
    """Open the dense model that a quantized checkpoint stands for, through transformers like any other."""
    scheme = read_scheme(checkpoint) if checkpoint.layout in COMPRESSED_TENSORS.values() else None
    layers = read_scaled_linears(checkpoint, scheme) if scheme else read_quantized_linears(checkpoint.path)
    weights: dict[str, torch.Tensor] = {}
    quantized: set[str] = set()
    for module, layer in layers:
        weights[f"{module}.weight"] = layer.dequantize().to(dtype)
        quantized |= {f"{module}.{suffix}" for suffix in ("weight", "weight_scale", "qweight", "qzeros", "scales", "g_idx")}
    linears = [name.removesuffix(".weight") for name in weights]
    weights |= read_tensors(checkpoint.path, [name for name in checkpoint.tensors if name not in quantized])
    config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
    del config.quantization_config
    models: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    model, found = models[type(config)].from_pretrained(None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True)
    check_tensors(model, checkpoint.path, missing=found["missing_keys"], unknown=found["unexpected_keys"])
    if scheme and inputs_rounded:
        for path in linears:
            round_inputs(model.get_submodule(path), scheme)
    return model


def check_tensors(model: PreTrainedModel, path: Path, *, missing: Iterable[str], unknown: Iterable[str]) -> None:
    """Raise UnusableModel, naming the first few, where the tensors of `path` are not those of the model's class."""
    faults = {"it lacks": list(missing), "the class does not know": list(unknown)}
    if wrong := [f"{how} {first_of(names)}" for how, names in faults.items() if names]:
        tied = str(model.config.tie_word_embeddings).lower()
        raise UnusableModel(
            f"{path}: its tensors are not those of {type(model).__name__} (tie_word_embeddings: {tied}): {', and '.join(wrong)}. "
            "transformers would fill in random numbers, or leave tensors out",
            key="model",
        )


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a directory's tokenizer.json, as it stands there, without truncation and padding.

    transformers' AutoTokenizer may build another one from the class that tokenizer_config.json names, and may write the post-processor
    anew; only special tokens and chat templates are taken from that file.
    """
    stored = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    backend = tokenizer.backend_tokenizer
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        setattr(backend, part, getattr(stored, part))
    backend.no_truncation()
    backend.no_padding()
    return tokenizer


def save_model(model: PreTrainedModel, out: Path, *, like: Path, dtype: str | None = None) -> None:
    """Write a dense checkpoint into `out`: config, safetensors, and the tokenizer files of the checkpoint `like`, byte for byte.

    dtype  "float16", "bfloat16" or "float32"; None takes the dtype of `like`
    Raises EdgepressError where the model holds other tensors than a dense `like`; tied ones may be in a file or not.
    """
    source = open_checkpoint(like)
    out.mkdir(parents=True, exist_ok=True)
    model.to(getattr(torch, dtype or source.dtype)).save_pretrained(out, max_shard_size="5GB")
    copy_tokenizer(like, out)
    if source.layout == "dense":
        check_names(out, _read_by(model, weight_map(out)), _read_by(model, source.tensors))


def _read_by(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Of the tensors of a checkpoint those that a model must find: not what it ties to others, nor what its class ignores in older files."""
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"]
    return [name for name in names if name not in model.all_tied_weights_keys and not any(re.search(pattern, name) for pattern in ignored)]


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy the tokenizer (and generation settings) of a checkpoint byte for byte."""
    for name in tokenizer_files(source):
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, out / name)
