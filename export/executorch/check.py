"""The settings of an ExecuTorch program, and which checkpoints can become one. Imports no torch: planning uses it."""

from typing import Annotated, Literal

from pydantic import Field

from compression.checkpoints.checkpoint import Checkpoint
from compression.errors import Incompatible
from compression.settings import Settings
from export.checks import check_traceable

MIN_LENGTH, DEFAULT_LENGTH = 16, 2048  # tokens of the cache; the default is bounded, since all of it is in memory from the start


class ExecutorchSettings(Settings):
    """What an ExecuTorch program computes in, and how many tokens it reads."""

    dtype: Annotated[Literal["float32"], Field(description="Type of weights, activations and KV cache.")] = "float32"
    max_length: Annotated[
        int | None,
        Field(
            ge=MIN_LENGTH,
            description=f"Tokens that fit, prompt and generation together; default: the model's context, {DEFAULT_LENGTH} at most.",
        ),
    ] = None
    chunk: Annotated[int, Field(ge=8, description="Tokens that a call reads at most; memory for activations is planned for so many.")] = 128

    def cache_length(self, checkpoint: Checkpoint) -> int:
        """Return how many tokens fit into the program's cache."""
        return min(checkpoint.max_length, DEFAULT_LENGTH) if self.max_length is None else self.max_length


def check_executorch(checkpoint: Checkpoint, settings: ExecutorchSettings) -> None:
    """Raise Incompatible where `export_executorch` does not take this checkpoint with these settings; `key` names the parameter."""
    check_traceable(checkpoint, "the ExecuTorch exporter")
    length = settings.cache_length(checkpoint)
    if not MIN_LENGTH <= length <= checkpoint.max_length:
        raise Incompatible(
            f"max_length {length} is not from {MIN_LENGTH} to the {checkpoint.max_length} tokens of this model", key="max_length"
        )
