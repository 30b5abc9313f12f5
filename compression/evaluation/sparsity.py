"""How many weights are zero."""

from pathlib import Path

import torch

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.masks import read_masks
from compression.checkpoints.shards import read_tensors


def sparsity(path: Path) -> float | None:
    """Share of zeros among the weights of the blocks' linear layers: exact zeros of a dense checkpoint, what the masks of a quantized one say.

    None for a quantized checkpoint without masks. One tensor is in memory at a time.
    Raises UnusableModel for a directory that is no checkpoint.
    """
    checkpoint = open_checkpoint(path)
    if checkpoint.layout == "dense":
        names = checkpoint.linear_tensors()
        zeros = sum(int(torch.count_nonzero(read_tensors(path, [name])[name] == 0)) for name in names)
        return zeros / sum(checkpoint.tensors[name].numel for name in names)
    if not checkpoint.sparse:
        return None
    masks = [(int(mask.sum()), mask.numel()) for mask in read_masks(path).values()]
    return 1 - sum(kept for kept, _ in masks) / sum(weights for _, weights in masks)
