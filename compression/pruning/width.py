"""Width pruning: MLP neurons and attention heads leave, and a smaller ordinary model remains."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from compression.checkpoints.checkpoint import Checkpoint, open_checkpoint
from compression.checkpoints.kept import read_kept, write_kept
from compression.checkpoints.loading import copy_tokenizer
from compression.checkpoints.masks import MaskWriter, read_masks
from compression.checkpoints.shards import CheckpointWriter, read_tensors
from compression.context import Context
from compression.errors import Incompatible
from compression.pruning.criteria import activation_scores, taylor_scores, unit_norms
from compression.pruning.settings import WidthCriterion, WidthSettings
from compression.pruning.structure import width_config
from compression.pruning.units import Units

K_QUANT_WIDTH = 256  # llama.cpp's K-quants take rows in blocks of 256


def prune_width(
    checkpoint: Path,
    out: Path,
    settings: WidthSettings,
    windows: torch.Tensor | None = None,
    *,
    context: Context,
) -> dict[str, float]:
    """Keep the best neurons and heads of every block, the same number in each, and write the smaller model.

    Masks of a sparse checkpoint are cut with the weights. `kept.safetensors` (compression/checkpoints/kept.py) says what remains.
    In a family that norms queries and keys of all heads together (OLMo 2), the norm is then over the heads that remain.

    Args:
        checkpoint: A dense checkpoint.
        out: The directory to write.
        settings: What leaves, by which criterion: l2 (`unit_norms`), activation (`activation_scores`), taylor (`taylor_scores`), or
            random, the control.
        windows: Calibration token ids, int64 [count, length]; activation and taylor need them.
        context: Device, seed (of random), progress and warnings.

    Returns:
        `kept_ratio` and `kept_heads_ratio` (as reached), `parameters_ratio`, `intermediate_size` and `num_attention_heads`.

    Raises:
        Incompatible: The checkpoint is quantized, the shares fit no width or number of heads, or `windows` are missing.
    """
    source = open_checkpoint(checkpoint)
    if source.layout != "dense":
        raise Incompatible(f"{checkpoint} is {source.layout}; width pruning takes a dense checkpoint")
    config = width_config(source, settings)
    units = Units(source, config, settings.heads)
    scores = _measured(source, windows, settings.criterion, units.counts, context)
    _warn_of_k_quants(source, config, context)
    generator = torch.Generator().manual_seed(context.seed)
    writer, masks = CheckpointWriter(out), MaskWriter(out)
    kept: dict[str, torch.Tensor] = {}
    written: set[str] = set()
    for index in range(source.num_layers):
        context.progress(index, source.num_layers, f"block {index + 1} of {source.num_layers}")
        block = f"{source.family.blocks}.{index}."
        tensors = read_tensors(
            checkpoint, [name for name in source.tensors if name.startswith(block) and _layer(name, block) in units.layers]
        )
        weights = {_layer(name, block): tensor for name, tensor in tensors.items() if name.endswith(".weight")}
        for path, count in units.counts.items():
            if settings.criterion == "l2":
                scores[block + path] = unit_norms(units.incoming(path, weights), weights[path], count)
            elif settings.criterion == "random":
                scores[block + path] = torch.rand(count, generator=generator)
        left = units.best({path: scores[block + path] for path in units.counts})
        kept |= {block + path: indices for path, indices in left.items()}
        slices = units.slices(left)
        writer.add(_cut(tensors, block, slices))
        masks.add(_cut(read_masks(checkpoint, prefix=block), block, slices))
        written |= set(tensors)
    writer.add(read_tensors(checkpoint, [name for name in source.tensors if name not in written]))
    masks.finish()
    copy_tokenizer(checkpoint, out)
    write_kept(out, read_kept(checkpoint), kept)
    writer.finish(config, names=source.tensors)
    context.progress(source.num_layers, source.num_layers, "pruned")
    after = sum(math.prod(info.shape) for info in open_checkpoint(out).tensors.values())
    before = sum(info.numel for info in source.tensors.values())
    return {
        "kept_ratio": config["intermediate_size"] / source.intermediate_size,
        "kept_heads_ratio": config["num_attention_heads"] / source.config["num_attention_heads"],
        "parameters_ratio": after / before,
        "intermediate_size": float(config["intermediate_size"]),
        "num_attention_heads": float(config["num_attention_heads"]),
    }


def _layer(name: str, block: str) -> str:
    """Return the path in the block of the layer that a tensor belongs to."""
    return name.removeprefix(block).rpartition(".")[0]


def _cut(tensors: Mapping[str, torch.Tensor], block: str, slices: Mapping[str, tuple[int, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Cut tensors, by name, to the slices of their layers; a bias has no columns to lose."""
    result = dict(tensors)
    for name, tensor in tensors.items():
        dim, indices = slices.get(_layer(name, block), (tensor.dim(), torch.empty(0)))
        if dim < tensor.dim():
            result[name] = tensor.index_select(dim, indices)
    return result


def _measured(
    source: Checkpoint, windows: torch.Tensor | None, criterion: WidthCriterion, units: Mapping[str, int], context: Context
) -> dict[str, torch.Tensor]:
    """Return the scores of a criterion for which the model must run; none for the others."""
    if criterion in ("l2", "random"):
        return {}
    if windows is None:
        raise Incompatible(f"criterion {criterion} needs calibration windows", key="criterion")
    return (activation_scores if criterion == "activation" else taylor_scores)(source, windows, units, context=context)


def _warn_of_k_quants(source: Checkpoint, config: Mapping[str, Any], context: Context) -> None:
    width = config["intermediate_size"]
    if width % K_QUANT_WIDTH:
        context.warn(
            f"the pruned MLP is {width} wide, which is not a multiple of {K_QUANT_WIDTH}: llama.cpp's K-quants fall back to larger types "
            f"for its down projection; multiple_of: {K_QUANT_WIDTH} avoids that"
        )
    attention = config["num_attention_heads"] * source.head_dim
    if config["num_attention_heads"] != source.config["num_attention_heads"] and attention % K_QUANT_WIDTH:
        context.warn(
            f"the pruned attention is {attention} wide ({config['num_attention_heads']} heads of {source.head_dim}), which is not a multiple of "
            f"{K_QUANT_WIDTH}: llama.cpp's K-quants fall back to larger types for its output projection"
        )
