"""AWQ: scale input channels by how strongly they are driven before rounding, then clip (Lin et al., arXiv 2306.00978).

Every candidate is scored on the second moment H of a layer's input, E‖(Ŵ − W)x‖² = tr(ΔW·H·ΔWᵀ), so that no candidate
runs the calibration tokens again.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from compression.calibration import Block, compress_blocks
from compression.checkpoint import open_checkpoint
from compression.context import Context
from compression.errors import Incompatible
from compression.quantization import check_group_size
from compression.quantization.grid import SHRINKS, fit_grid
from compression.quantization.layouts import AWQ_BITS, awq_config, awq_tensors, quantized_linear

EXPONENTS = tuple(step / 10 for step in range(11))
NO_CLIP, COARSE_CLIP = (1.0,), (1.0, 0.95, 0.9, 0.85, 0.8)


def quantize_awq(
    checkpoint: Path,
    out: Path,
    windows: torch.Tensor,
    *,
    bits: int = 4,
    group_size: int = 128,
    clip: bool = True,
    context: Context,
) -> dict[str, float]:
    """Quantize every linear layer of every block of a dense checkpoint, with zero points; write an AWQ GEMM checkpoint to `out`.

    windows  calibration token ids, int64 [count, length]
    clip     shrink each group's range where that lowers the error of its output
    Scales are folded into what stands before a layer (`Family.scale_pairs`; v → o only where both are equally wide).
    Embeddings and head stay as they are.

    Returns `fallback_layers` (0: rounding to nearest needs no inverse), `scaled_pairs`: pairs for which a scale was better than none.
    Raises Incompatible for bits other than 4 or a group size that does not fit.
    """
    source = open_checkpoint(checkpoint)
    if bits != AWQ_BITS:
        raise Incompatible(f"the AWQ layout has 4 bits, not {bits}; quantize.gptq has 2, 3, 4 and 8", key="bits")
    check_group_size(source, group_size, bits)
    scaled = 0

    def compress(block: Block) -> Mapping[str, torch.Tensor]:
        nonlocal scaled
        grams = {path: shared.gram for shared in block.inputs for path in shared.layers}
        for producer, consumers in source.family.scale_pairs:
            scaled += move_scale(block, producer, consumers, grams, group_size=group_size, clip=clip)
        tensors: dict[str, torch.Tensor] = {}
        for path, gram in grams.items():
            weight = block.linear(path).weight
            grid = fit_grid(weight, bits=bits, group_size=group_size, symmetric=False, gram=gram, shrinks=SHRINKS if clip else NO_CLIP)
            layer = quantized_linear(grid.quantize(weight), grid)
            weight.copy_(layer.dequantize())
            tensors |= {f"{path}.{suffix}": tensor for suffix, tensor in awq_tensors(layer).items()}
        return tensors

    compress_blocks(checkpoint, out, windows, compress, config={"quantization_config": awq_config(group_size=group_size)}, context=context)
    return {"fallback_layers": 0.0, "scaled_pairs": float(scaled)}


def move_scale(
    block: Block, producer: str, consumers: tuple[str, ...], grams: dict[str, torch.Tensor], *, group_size: int, clip: bool
) -> bool:
    """Multiply the consumers' input channels by their best scale and divide the producer's outputs by it; whether there was one.

    The block computes what it did. `grams` (second moments by layer) follows the new inputs.
    """
    before = block.module.get_submodule(producer)
    gram = grams[consumers[0]]
    layers = [block.linear(path) for path in consumers]
    if isinstance(before, nn.Linear) and before.out_features != layers[0].in_features:
        return False  # grouped-query attention: one value channel feeds several heads
    scales = search_scales(torch.cat([layer.weight for layer in layers]), gram, group_size=group_size, clip=clip)
    if scales is None:
        return False
    for parameter in before.parameters(recurse=False):
        parameter.div_(scales if parameter.dim() == 1 else scales[:, None])
    for layer in layers:
        layer.weight.mul_(scales)
    moved = gram / torch.outer(scales, scales)
    grams.update(dict.fromkeys(consumers, moved))
    return True


def search_scales(weight: torch.Tensor, gram: torch.Tensor, *, group_size: int, clip: bool = True) -> torch.Tensor | None:
    """The scale of each input channel under which rounding costs least, float32 [in]; None where none is better.

    weight  [out, in]; rows of layers that share the input are stacked
    gram    [in, in], mean of x xᵀ
    clip    whether the grids will be clipped: candidates are then scored on clipped grids
    Candidates are s = a^α / m^(1−α), normalized to √(max·min) = 1, for α in `EXPONENTS`: a is the root mean square of a
    channel's input, m the mean of its weights relative to their group's largest (as in AutoAWQ); and s = a^α.
    """
    activation = gram.diagonal().sqrt()
    groups = weight.abs().unflatten(1, (-1, group_size))
    magnitude = (groups / groups.amax(2, keepdim=True).clamp_min(1e-12)).flatten(1).mean(0)
    shrinks = COARSE_CLIP if clip else NO_CLIP
    best, best_scales = _rounding_loss(weight, torch.ones_like(activation), gram, group_size, shrinks), None
    for exponent in EXPONENTS:
        for candidate in (activation**exponent, activation**exponent / magnitude.clamp_min(1e-4) ** (1 - exponent)):
            bounded = candidate.clamp_min(1e-4)
            scales = bounded / (bounded.max() * bounded.min()).sqrt()
            loss = _rounding_loss(weight, scales, gram, group_size, shrinks)
            if loss < best:
                best, best_scales = loss, scales
    return best_scales


def _rounding_loss(weight: torch.Tensor, scales: torch.Tensor, gram: torch.Tensor, group_size: int, shrinks: tuple[float, ...]) -> float:
    """tr(ΔW·H·ΔWᵀ) of rounding W·diag(s) to nearest on a grid clipped as it will be, only more coarsely."""
    scaled = weight * scales
    moved = gram / torch.outer(scales, scales)
    grid = fit_grid(scaled, bits=AWQ_BITS, group_size=group_size, symmetric=False, gram=moved, shrinks=shrinks)
    delta = grid.dequantize(grid.quantize(scaled)).sub_(scaled)
    return float(((delta @ moved) * delta).sum())
