"""Which parts of the unpruned model remain, in `kept.safetensors` next to the weights: what comparing both models needs.

Its entries are int32, ascending indices into the model as it was before any structured pruning, under paths in the model as it is now:
the down projection of each block (neurons), its output projection (query heads) and the list of blocks (blocks). Absent: all remain.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

KEPT = "kept.safetensors"


def read_kept(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Read the entries of a checkpoint directory; none where nothing was pruned."""
    return load_file(checkpoint / KEPT) if (checkpoint / KEPT).is_file() else {}


def write_kept(out: Path, earlier: Mapping[str, torch.Tensor], now: Mapping[str, torch.Tensor]) -> None:
    """Write what remains after a further pruning.

    Args:
        out: The new checkpoint directory.
        earlier: Entries of the checkpoint that was pruned, under paths in the new one.
        now: Indices into that checkpoint, int64 or int32, ascending.
    """
    composed = {path: earlier[path][indices.long()] if path in earlier else indices.to(torch.int32) for path, indices in now.items()}
    save_file(dict(earlier) | composed, out / KEPT)


def copy_kept(source: Path, out: Path) -> None:
    """Carry the entries of a checkpoint over to one of the same shape."""
    if (source / KEPT).is_file():
        shutil.copyfile(source / KEPT, out / KEPT)
