"""Open the model to train, and write it when it is trained."""

import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel

from compression.checkpoints.checkpoint import Checkpoint, open_checkpoint
from compression.checkpoints.loading import load_model, save_model
from compression.checkpoints.masks import read_masks, write_masks
from compression.context import Context
from compression.data.fill import unknown_token
from compression.errors import Incompatible, UnusableData
from compression.training import processes
from compression.training.masks import attach_masks, attached_masks, zero_pruned


def open_student(path: Path, rows: torch.Tensor, context: Context) -> PreTrainedModel:
    """Load the model to train, in float32 on the context's device.

    Weights of a sparse model get their masks (`attach_masks`): `train` keeps what is pruned at zero, and `save_student` writes the masks again.

    Raises:
        Incompatible: The checkpoint is quantized.
        UnusableData: Rows hold tokens outside its vocabulary, or are longer than it reads.
    """
    check_student(open_checkpoint(path), rows)
    model = load_model(path, device=context.device)
    attach_masks(model, read_masks(path))
    return model


def check_student(checkpoint: Checkpoint, rows: torch.Tensor) -> None:
    """Raise what `open_student` raises, without loading weights."""
    path = checkpoint.path
    if checkpoint.layout != "dense":
        raise Incompatible(f"{path} is quantized ({checkpoint.layout}) and cannot be trained; train before quantizing")
    for token in (int(rows.min()), int(rows.max())) if rows.numel() else ():
        if not 0 <= token < checkpoint.vocab_size:
            raise unknown_token(token, checkpoint.vocab_size, path)
    if rows.shape[-1] > checkpoint.max_length:
        raise UnusableData(f"training rows are {rows.shape[-1]} tokens long, {path} reads {checkpoint.max_length} at most", key="length")


def save_student(model: PreTrainedModel, out: Path, *, like: Path) -> None:
    """Write the trained model in the dtype of `like`, with its masks and the kept.safetensors of `like`, which later stages read."""
    if not processes.is_first():
        return  # every process has the same weights
    zero_pruned(model)  # merging an adapter filled them
    save_model(model, out, like=like)
    write_masks(out, attached_masks(model))
    if (like / "kept.safetensors").is_file():
        shutil.copyfile(like / "kept.safetensors", out / "kept.safetensors")
