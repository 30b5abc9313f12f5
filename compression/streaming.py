"""Rewriting the linear layers of a checkpoint one tensor at a time: what needs no calibration needs no model in memory either."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from compression.checkpoint import Checkpoint, open_checkpoint
from compression.context import Context
from compression.errors import Incompatible
from compression.loading import copy_tokenizer
from compression.pruning.masks import MASKS
from compression.shards import CheckpointWriter, read_tensors

Rewrite = Callable[[str, torch.Tensor], Mapping[str, torch.Tensor]]


def rewrite_linears(checkpoint: Path, out: Path, rewrite: Rewrite, *, config: Mapping[str, Any], context: Context) -> None:
    """Write a checkpoint to `out` in which `rewrite(path, weight)` stands for the weight of every linear layer of every block.

    rewrite  from a layer's path in the model and its weight [out, in] on the context's device to tensors by suffix ("qweight")
    config   entries added to config.json
    Everything else, masks too, is carried along.
    Raises Incompatible for a quantized checkpoint or one whose blocks hold matrices that are no linear layers.
    """
    source = open_checkpoint(checkpoint)
    if source.layout != "dense":
        raise Incompatible(f"{checkpoint} is quantized already ({source.layout}); a dense checkpoint is needed")
    weights = set(source.linear_tensors())
    linear_layers(skeleton(source), source)
    writer = CheckpointWriter(out)
    for done, name in enumerate(source.tensors):
        context.progress(done, len(source.tensors), name)
        tensors = read_tensors(checkpoint, [name])
        if name in weights:
            path = name.removesuffix(".weight")
            tensors = {f"{path}.{suffix}": tensor for suffix, tensor in rewrite(path, tensors[name].to(context.device)).items()}
        writer.add(tensors)
    copy_tokenizer(checkpoint, out)
    if source.sparse:
        shutil.copyfile(checkpoint / MASKS, out / MASKS)
    writer.finish(source.config | dict(config))
    context.progress(len(source.tensors), len(source.tensors), "rounded")


def skeleton(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a checkpoint without weights, on the meta device."""
    config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def linear_layers(model: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Paths of all linear layers of a model.

    Raises Incompatible where matrices of its blocks are not the weights of linear layers (experts in one tensor, convolutions).
    """
    found = [path for path, part in model.named_modules() if isinstance(part, nn.Linear)]
    wrong = sorted({name.removesuffix(".weight") for name in checkpoint.linear_tensors()} - set(found))
    if wrong:
        shown = ", ".join(wrong[:4])
        raise Incompatible(
            f"{checkpoint.path}: {shown} of its blocks are no linear layers (nn.Linear), so they cannot be compressed", key="model"
        )
    return found


def layers_outside(checkpoint: Checkpoint) -> list[str]:
    """Paths of the linear layers outside a model's blocks, sorted: its head, and in some families more. Raises what `linear_layers` does."""
    inside = {name.removesuffix(".weight") for name in checkpoint.linear_tensors()}
    return sorted(set(linear_layers(skeleton(checkpoint), checkpoint)) - inside)
