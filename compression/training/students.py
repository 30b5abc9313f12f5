"""Opening what is to be trained, and writing it when it is."""

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
from compression.training.held_masks import held_masks, hold_masks, zero_pruned


def open_student(path: Path, rows: torch.Tensor, context: Context) -> PreTrainedModel:
    """The model to train, in float32 on the context's device. Weights of a sparse one carry their masks (`hold_masks`): `train` keeps
    what is pruned at zero, and `save_student` writes the masks again.

    Raises Incompatible (a quantized checkpoint), UnusableData (tokens outside its vocabulary, rows longer than it reads).
    """
    check_student(open_checkpoint(path), rows)
    model = load_model(path, device=context.device)
    hold_masks(model, read_masks(path))
    return model


def check_student(checkpoint: Checkpoint, rows: torch.Tensor) -> None:
    """Raises what `open_student` does."""
    path = checkpoint.path
    if checkpoint.layout != "dense":
        raise Incompatible(f"{path} is quantized ({checkpoint.layout}) and cannot be trained; train before quantizing")
    for token in (int(rows.min()), int(rows.max())) if rows.numel() else ():
        if not 0 <= token < checkpoint.vocab_size:
            raise unknown_token(token, checkpoint.vocab_size, path)
    if rows.shape[-1] > checkpoint.max_length:
        raise UnusableData(f"training rows are {rows.shape[-1]} tokens long, {path} reads {checkpoint.max_length} at most", key="length")


def save_student(model: PreTrainedModel, out: Path, *, like: Path) -> None:
    """Write the trained model in the dtype of `like`, with what a later stage needs to know of its pruning: its masks, kept.safetensors."""
    if not processes.is_first():
        return  # every process has the same
    zero_pruned(model)  # an adapter that was merged filled them
    save_model(model, out, like=like)
    write_masks(out, held_masks(model))
    if (like / "kept.safetensors").is_file():
        shutil.copyfile(like / "kept.safetensors", out / "kept.safetensors")
