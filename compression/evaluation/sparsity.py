"""How many weights are zero."""

from pathlib import Path

import torch

from compression.checkpoint import open_checkpoint
from compression.families import Family
from compression.shards import read_tensors


def sparsity(path: Path) -> float:
    """Share of exact zeros among the matrices of a dense checkpoint, embedding and head left out; one tensor in memory at a time.

    Raises UnusableModel for a directory that is no checkpoint.
    """
    names = Family()
    kept_out = {f"{names.embed}.weight", f"{names.head}.weight"}
    checkpoint = open_checkpoint(path)
    matrices = [
        name for name, info in checkpoint.tensors.items() if len(info.shape) == 2 and name.endswith(".weight") and name not in kept_out
    ]
    zeros = sum(int(torch.count_nonzero(read_tensors(path, [name])[name] == 0)) for name in matrices)
    return zeros / sum(checkpoint.tensors[name].numel for name in matrices)
