"""fp8: weights as E4M3 numbers (Micikevicius et al., arXiv 2209.05433), inputs rounded to E4M3 token by token while the model runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.compressed_tensors import round_weight
from compression.checkpoints.schemes import Scheme
from compression.checkpoints.skeleton import layers_outside
from compression.checkpoints.streaming import rewrite_linears
from compression.context import Context


def quantize_fp8(checkpoint: Path, out: Path, *, strategy: Literal["channel", "tensor"] = "channel", context: Context) -> dict[str, float]:
    """Round every linear layer of every block of a dense checkpoint to E4M3; write a compressed-tensors checkpoint to `out`.

    strategy  one scale for each output channel, or one for the whole matrix
    Needs no calibration data. Tensors stream through one at a time, on the context's device. Masks are carried along.
    Embeddings and head stay as they are.

    Returns `quantized_layers`.
    Raises Incompatible for a quantized checkpoint or one whose blocks hold matrices that are no linear layers, UnusableModel
    for weights that are not finite.
    """
    source = open_checkpoint(checkpoint)
    scheme = Scheme("float", strategy)

    def rewrite(path: str, weight: torch.Tensor) -> Mapping[str, torch.Tensor]:
        return round_weight(weight, scheme, dtype=weight.dtype, name=f"{checkpoint}: {path}.weight").tensors()

    rewrite_linears(checkpoint, out, rewrite, config={"quantization_config": scheme.config(layers_outside(source))}, context=context)
    return {"quantized_layers": float(len(source.linear_tensors()))}
