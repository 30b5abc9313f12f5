"""SmoothQuant: move the difficulty of rounding from activations into weights, then round both to 8 bits (Xiao et al., arXiv 2211.10438)."""

from pathlib import Path

import torch

from compression.calibration.calibration import BlockMethod, CompressedBlock, compress_blocks
from compression.calibration.walk import Block
from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.compressed_tensors import round_inputs, round_weight
from compression.checkpoints.families import Family
from compression.checkpoints.schemes import Scheme
from compression.checkpoints.skeleton import layers_outside
from compression.context import Context
from compression.quantization.scaling import scale_pairs
from compression.quantization.settings import SmoothQuantSettings

SMALLEST = 1e-5  # of a channel's activation, weight and scale, as in the authors' code


def quantize_smoothquant(
    checkpoint: Path, out: Path, settings: SmoothQuantSettings, windows: torch.Tensor, *, work: Path | None = None, context: Context
) -> dict[str, float]:
    """Smooth every block of a dense checkpoint and round its linear layers to int8; write a compressed-tensors W8A8 checkpoint to `out`.

    Each output channel has a scale. The smoothing scales are folded into the operation before a layer (`Family.scale_pairs`).
    Embeddings and head stay as they are.

    Args:
        checkpoint: A dense checkpoint directory.
        out: A new directory.
        settings: How much of the outliers moves into the weights.
        windows: Calibration token ids, int64 [count, length].
        work: Where the walk keeps its progress; None keeps none.
        context: Seed, device and callbacks.

    Returns:
        `scaled_pairs`: pairs through which scales were moved, over all blocks.

    Raises:
        Incompatible: The checkpoint is quantized.
        UnusableModel: The pairs of this architecture are not declared (with an alpha), or weights are not finite.
    """
    alpha = settings.alpha
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
            round_inputs(layer, scheme)  # the next blocks see what will run
            tensors |= {f"{path}.{suffix}": tensor for suffix, tensor in rounded.tensors().items()}
        return CompressedBlock(tensors, counts={"scaled_pairs": float(moved)})

    config = {"quantization_config": scheme.config(layers_outside(source))}
    method = BlockMethod(compress, {"method": "smoothquant", "alpha": alpha}, config, frozenset({"absmax"}))
    return compress_blocks(checkpoint, out, windows, method, work=work, context=context)


def smooth(block: Block, family: Family, alpha: float) -> int:
    """Move scales through every pair of a block, which still computes the same function; return the number of pairs."""
    absmax = {path: shared.absmax for shared in block.inputs for path in shared.layers}
    pairs = list(scale_pairs(block, family))
    for pair in pairs:
        inputs = absmax[pair.consumers[0]]
        assert inputs is not None
        pair.fold(smoothing_scales(inputs, torch.cat([layer.weight for layer in pair.layers]), alpha))
    return len(pairs)


def smoothing_scales(absmax: torch.Tensor, weight: torch.Tensor, alpha: float) -> torch.Tensor:
    """Compute s_j = max|x_j|^alpha / max|w_j|^(1 − alpha) (equation 4): inputs are divided by it, weights multiplied.

    Args:
        absmax: The largest absolute value of each input channel over the calibration tokens, [in].
        weight: [out, in]; rows of all layers that share the input.
        alpha: How much of the outliers moves into the weights, 0 to 1.

    Returns:
        float32 [in]; 1 for a channel whose inputs or weights are all zero.
    """
    read = weight.float().abs().amax(0)
    scales = absmax.float().clamp_min(SMALLEST) ** alpha / read.clamp_min(SMALLEST) ** (1 - alpha)
    return torch.where((absmax == 0) | (read == 0), 1.0, scales.clamp_min(SMALLEST))
