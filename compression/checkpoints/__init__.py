"""Read, normalise, load, stream and write checkpoint directories, in every layout. Importing the package imports no torch."""

from typing import TYPE_CHECKING

from compression.checkpoints.checkpoint import Checkpoint, Layout, open_checkpoint
from compression.lazy import lazy_names

if TYPE_CHECKING:
    from compression.checkpoints.loading import load_model, load_tokenizer, save_model

__all__ = ["Checkpoint", "Layout", "load_model", "load_tokenizer", "open_checkpoint", "save_model"]
__getattr__ = lazy_names(
    __name__,
    load_model="compression.checkpoints.loading",
    load_tokenizer="compression.checkpoints.loading",
    save_model="compression.checkpoints.loading",
)
