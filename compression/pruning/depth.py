"""Depth pruning: blocks leave, and a shallower ordinary model remains."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch.nn import functional as F

from compression.calibration.walk import walk
from compression.checkpoints.checkpoint import Checkpoint, open_checkpoint
from compression.checkpoints.kept import read_kept, write_kept
from compression.checkpoints.loading import copy_tokenizer, load_model
from compression.checkpoints.masks import MaskWriter, read_masks
from compression.checkpoints.shards import CheckpointWriter, read_tensors
from compression.context import Context
from compression.errors import Incompatible
from compression.evaluation.findings import exponential
from compression.pruning.settings import DepthSettings
from compression.pruning.structure import blocks_left, depth_config

TOKENS_PER_FORWARD = 1024


def prune_depth(
    checkpoint: Path,
    out: Path,
    settings: DepthSettings,
    windows: torch.Tensor | None = None,
    *,
    context: Context,
) -> dict[str, float]:
    """Remove decoder blocks and write the shallower model, its blocks numbered anew.

    Masks follow their blocks. `kept.safetensors` (compression/checkpoints/kept.py) says which blocks remain.

    Args:
        checkpoint: A dense checkpoint.
        out: The directory to write.
        settings: How many blocks leave, or which, and by which criterion: influence removes those with the least `block_influence`, all at
            once; perplexity removes `redundant_blocks`, one after another.
        windows: Calibration token ids, int64 [count, length]; not needed with `settings.blocks`.
        context: Device and progress. `context.metrics` receives the influence of every block (step: the block), or the calibration
            perplexity after each removal (step: how many are removed).

    Returns:
        `kept_ratio`, `num_hidden_layers` and `parameters_ratio`.

    Raises:
        Incompatible: The checkpoint is quantized, the number of blocks does not fit, or `windows` are missing.
    """
    source = open_checkpoint(checkpoint)
    if source.layout != "dense":
        raise Incompatible(f"{checkpoint} is {source.layout}; depth pruning takes a dense checkpoint")
    gone = _chosen(source, windows, settings, context)
    kept = [block for block in range(source.num_layers) if block not in gone]
    config = depth_config(source, kept)
    listed = source.family.blocks
    writer, masks = CheckpointWriter(out), MaskWriter(out)
    inside: list[str] = []
    earlier = read_kept(checkpoint)
    remaining = {name: indices for name, indices in earlier.items() if not name.startswith(f"{listed}.")}
    for index, block in enumerate(kept):
        context.progress(index, len(kept), f"block {block} becomes block {index}")
        before, after = f"{listed}.{block}.", f"{listed}.{index}."
        renamed = {after + name.removeprefix(before): name for name in source.tensors if name.startswith(before)}
        tensors = read_tensors(checkpoint, renamed.values())
        writer.add({name: tensors[old] for name, old in renamed.items()})
        inside += renamed
        masks.add(_renamed(read_masks(checkpoint, prefix=before), before, after))
        remaining |= _renamed(earlier, before, after)
    outside = [name for name in source.tensors if not name.startswith(f"{listed}.")]
    writer.add(read_tensors(checkpoint, outside))
    masks.finish()
    copy_tokenizer(checkpoint, out)
    write_kept(out, remaining, {listed: torch.tensor(kept, dtype=torch.int32)})
    writer.finish(config, names=outside + inside)
    context.progress(len(kept), len(kept), "pruned")
    size = sum(info.numel for info in source.tensors.values())
    return {
        "kept_ratio": len(kept) / source.num_layers,
        "num_hidden_layers": float(len(kept)),
        "parameters_ratio": sum(info.numel for info in open_checkpoint(out).tensors.values()) / size,
    }


def _renamed(entries: Mapping[str, torch.Tensor], before: str, after: str) -> dict[str, torch.Tensor]:
    """Return the entries whose names begin with `before`, which `after` replaces."""
    return {after + name.removeprefix(before): tensor for name, tensor in entries.items() if name.startswith(before)}


def _chosen(source: Checkpoint, windows: torch.Tensor | None, settings: DepthSettings, context: Context) -> set[int]:
    """Return the blocks that leave."""
    count = source.num_layers - blocks_left(source, settings)
    if settings.blocks is not None:
        return set(settings.blocks)
    if windows is None:
        raise Incompatible(f"criterion {settings.criterion} needs calibration windows; blocks names blocks without any", key="criterion")
    if settings.criterion == "perplexity":
        return set(redundant_blocks(source, windows, count, context=context))
    influence = block_influence(source, windows, context=context)
    for block, value in enumerate(influence.tolist()):
        context.metrics({"block_influence": value}, block)
    return set(influence.argsort(stable=True)[:count].tolist())


def block_influence(checkpoint: Checkpoint, windows: torch.Tensor, *, context: Context) -> torch.Tensor:
    """Return one minus the mean cosine of each block's input and output over all tokens (Men et al., ShortGPT, arXiv 2403.03853).

    Args:
        checkpoint: A dense checkpoint.
        windows: Token ids, int64 [count, length].
        context: Device and progress.

    Returns:
        float64 [blocks].
    """
    influence = []
    for block in walk(checkpoint, windows, collect=frozenset(), context=context):
        cosines = [F.cosine_similarity(before.double(), after.double(), dim=-1).flatten() for before, after in block.passes()]
        influence.append(1 - torch.cat(cosines).mean())
    return torch.stack(influence).cpu()


def redundant_blocks(checkpoint: Checkpoint, windows: torch.Tensor, count: int, *, context: Context) -> list[int]:
    """Choose blocks greedily by the calibration perplexity without them (Song et al., SLEB, arXiv 2402.09025).

    Every round leaves out each remaining block, alone, and removes the one without which the perplexity is lowest. That takes about
    count · blocks runs of the windows. The model is loaded, in float32 on the CPU, else in its dtype.

    Args:
        checkpoint: A dense checkpoint.
        windows: Token ids, int64 [count, length].
        count: How many blocks to choose.
        context: Device and progress; `context.metrics` receives the perplexity after each removal.

    Returns:
        The blocks in the order of their removal; of equal ones the first.
    """
    on_cpu = torch.device(context.device).type == "cpu"
    model = load_model(checkpoint.path, dtype=torch.float32 if on_cpu else None, device=context.device)
    layers = model.get_submodule(checkpoint.family.blocks)
    assert isinstance(layers, torch.nn.ModuleList)
    remaining = list(range(checkpoint.num_layers))
    gone: list[int] = []
    done, runs = 0, sum(checkpoint.num_layers - removed for removed in range(count))
    while len(gone) < count:
        losses = {}
        for block in remaining:
            context.progress(done, runs, f"calibration without block {block}")
            layers[block].forward = _skip  # it stays in its place, since a block's mask and positions depend on its number
            losses[block] = _mean_loss(model, windows.to(context.device))
            del layers[block].forward
            done += 1
        best = min(losses, key=lambda block: losses[block])
        layers[best].forward = _skip
        remaining.remove(best)
        gone.append(best)
        context.metrics({"calibration_perplexity": exponential(losses[best])}, len(gone))
    return gone


def _skip(hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return hidden_states


@torch.no_grad()
def _mean_loss(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """Return the mean cross-entropy of all next tokens, in nats."""
    total = 0.0
    for ids in windows.split(max(1, TOKENS_PER_FORWARD // windows.shape[1])):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        total += F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none").double().sum().item()
    return total / windows[:, 1:].numel()
