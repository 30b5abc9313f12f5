"""Rewrite the linear layers of a checkpoint one tensor at a time: methods without calibration need no model in memory."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.loading import copy_tokenizer
from compression.checkpoints.masks import MASKS
from compression.checkpoints.shards import CheckpointWriter, read_tensors
from compression.checkpoints.skeleton import linear_layers, skeleton
from compression.context import Context
from compression.errors import Incompatible

Rewrite = Callable[[str, torch.Tensor], Mapping[str, torch.Tensor]]


def rewrite_linears(checkpoint: Path, out: Path, rewrite: Rewrite, *, config: Mapping[str, Any], context: Context) -> None:
    """Write a checkpoint to `out` in which `rewrite(path, weight)` replaces the weight of every linear layer of every block.

    Everything else, masks too, is carried along.

    Args:
        checkpoint: A dense checkpoint directory.
        out: A new directory.
        rewrite: From a layer's path in the model and its weight [out, in] on the context's device to tensors by suffix ("qweight").
        config: Entries added to config.json.
        context: Device and progress.

    Raises:
        Incompatible: The checkpoint is quantized, or its blocks hold matrices that are not linear layers.
    """
    source = open_checkpoint(checkpoint)
    if source.layout != "dense":
        raise Incompatible(f"{checkpoint} is quantized already ({source.layout}); a dense checkpoint is needed")
    weights = set(source.linear_tensors())
    linear_layers(skeleton(source), source)
    writer, expected = CheckpointWriter(out), set(source.tensors) - weights
    for done, name in enumerate(source.tensors):
        context.progress(done, len(source.tensors), name)
        tensors = read_tensors(checkpoint, [name])
        if name in weights:
            path = name.removesuffix(".weight")
            tensors = {f"{path}.{suffix}": tensor for suffix, tensor in rewrite(path, tensors[name].to(context.device)).items()}
            expected |= tensors.keys()
        writer.add(tensors)
    copy_tokenizer(checkpoint, out)
    if source.sparse:
        shutil.copyfile(checkpoint / MASKS, out / MASKS)
    writer.finish(source.config | dict(config), names=expected)
    context.progress(len(source.tensors), len(source.tensors), "rounded")
