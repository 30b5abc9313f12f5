"""SmoothQuant: move the difficulty of rounding from activations into weights, then round both to 8 bits (Xiao et al., arXiv 2211.10438)."""

from pathlib import Path

import torch

from compression.calibration.calibration import CompressedBlock, compress_blocks
from compression.calibration.walk import Block
from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.compressed_tensors import round_inputs, round_weight
from compression.checkpoints.families import Family
from compression.checkpoints.schemes import Scheme
from compression.checkpoints.skeleton import layers_outside
from compression.context import Context
from compression.quantization.scaling import scale_pairs

SMALLEST = 1e-5  # of a channel's activation, weight and scale, as in the authors' code


def quantize_smoothquant(
    checkpoint: Path,
    out: Path,
    windows: torch.Tensor,
    *,
    alpha: float | None = 0.5,
    work: Path | None = None,
    context: Context,
) -> dict[str, float]:
    """Smooth every block of a dense checkpoint and round its linear layers to int8, one scale for each output channel; write a
    compressed-tensors W8A8 checkpoint to `out`.

    windows  calibration token ids, int64 [count, length]
    alpha    how much of the difficulty moves into the weights, 0 … 1; None moves nothing: plain rounding, the control
    work     where the walk keeps its progress
    Scales are folded into what stands before a layer (`Family.scale_pairs`). Embeddings and head stay as they are.

    Returns `scaled_pairs`: pairs through which scales were moved, over all blocks.
    Raises Incompatible for a quantized checkpoint, UnusableModel for an architecture whose pairs are not declared (with an alpha) and for weights that are not finite.
    """
    source = open_checkpoint(checkpoint)
    family = None if alpha is None else source.family
    scheme = Scheme("int")

    def compress(block: Block) -> CompressedBlock:
        moved = 0 if alpha is None or family is None else smooth(block, family, alpha)
        tensors: dict[str, torch.Tensor] = {}
        for path in (path for shared in block.each_input() for path in shared.layers):
            layer = block.linear(path)
            name = f"{path}.weight"
            rounded = round_weight(layer.weight, scheme, dtype=block.dtypes[name], name=f"{checkpoint}: {block.name}.{name}")
            layer.weight.copy_(rounded.dequantize())
            round_inputs(layer, scheme)  # the blocks behind see what will run
            tensors |= {f"{path}.{suffix}": tensor for suffix, tensor in rounded.tensors().items()}
        return CompressedBlock(tensors, counts={"scaled_pairs": float(moved)})

    config = {"quantization_config": scheme.config(layers_outside(source))}
    return compress_blocks(
        checkpoint, out, windows, compress, settings={"method": "smoothquant", "alpha": alpha}, config=config,
        collect=frozenset({"absmax"}), work=work, context=context,
    )  # fmt: skip


def smooth(block: Block, family: Family, alpha: float) -> int:
    """Move scales through every pair of a block, which computes what it did; how many pairs that were."""
    absmax = {path: shared.absmax for shared in block.inputs for path in shared.layers}
    pairs = list(scale_pairs(block, family))
    for pair in pairs:
        driven = absmax[pair.consumers[0]]
        assert driven is not None
        pair.fold(smoothing_scales(driven, torch.cat([layer.weight for layer in pair.layers]), alpha))
    return len(pairs)


def smoothing_scales(absmax: torch.Tensor, weight: torch.Tensor, alpha: float) -> torch.Tensor:
    """s_j = max|x_j|^alpha / max|w_j|^(1 − alpha), float32 [in] (equation 4): inputs are divided by it, weights multiplied.

    absmax  [in], the largest absolute value of each input channel over the calibration tokens
    weight  [out, in]; rows of all layers that share the input
    A channel that is never driven or never read keeps its scale.
    """
    read = weight.float().abs().amax(0)
    scales = absmax.float().clamp_min(SMALLEST) ** alpha / read.clamp_min(SMALLEST) ** (1 - alpha)
    return torch.where((absmax == 0) | (read == 0), 1.0, scales.clamp_min(SMALLEST))
