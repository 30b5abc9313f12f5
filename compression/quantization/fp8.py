"""fp8: weights as E4M3 numbers (Micikevicius et al., arXiv 2209.05433), inputs rounded to E4M3 token by token while the model runs."""

from collections.abc import Mapping
from pathlib import Path

import torch

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.compressed_tensors import round_weight
from compression.checkpoints.schemes import Scheme
from compression.checkpoints.skeleton import layers_outside
from compression.checkpoints.streaming import rewrite_linears
from compression.context import Context
from compression.quantization.settings import FP8Settings


def quantize_fp8(checkpoint: Path, out: Path, settings: FP8Settings, *, context: Context) -> dict[str, float]:
    """Round every linear layer of every block of a dense checkpoint to E4M3; write a compressed-tensors checkpoint to `out`.

    Tensors stream through one at a time, on the context's device. Masks are carried along. Embeddings and head stay as they are.

    Args:
        checkpoint: A dense checkpoint directory.
        out: A new directory.
        settings: Which weights share a scale.
        context: Seed, device and callbacks.

    Returns:
        `quantized_layers`.

    Raises:
        Incompatible: The checkpoint is quantized, or its blocks hold matrices that are not linear layers.
        UnusableModel: Weights are not finite.
    """
    source = open_checkpoint(checkpoint)
    scheme = Scheme("float", settings.strategy)

    def rewrite(path: str, weight: torch.Tensor) -> Mapping[str, torch.Tensor]:
        return round_weight(weight, scheme, dtype=weight.dtype, name=f"{checkpoint}: {path}.weight").tensors()

    rewrite_linears(checkpoint, out, rewrite, config={"quantization_config": scheme.config(layers_outside(source))}, context=context)
    return {"quantized_layers": float(len(source.linear_tensors()))}
