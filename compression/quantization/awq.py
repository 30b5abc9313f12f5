"""AWQ: scale input channels by how strongly they are driven before rounding, then clip (Lin et al., arXiv 2306.00978).

Every candidate is scored on the second moment H of a layer's input, E‖(Ŵ − W)x‖² = tr(ΔW·H·ΔWᵀ), so that no candidate
runs the calibration tokens again.
"""

from dataclasses import replace
from pathlib import Path

import torch

from compression.calibration.calibration import BlockMethod, CompressedBlock, compress_blocks
from compression.calibration.second_order import output_power, stacked
from compression.calibration.walk import Block
from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.layouts import awq_tensors
from compression.checkpoints.quantization_config import WeightScheme, awq_config
from compression.context import Context
from compression.quantization.grid import NO_SHRINK, SHRINKS, fit_grid
from compression.quantization.rounding import RoundedLayers, group_by_scheme
from compression.quantization.scaling import scale_pairs
from compression.quantization.settings import AWQSettings, plan_schemes

EXPONENTS = tuple(step / 10 for step in range(11))
COARSE_CLIP = (1.0, 0.95, 0.9, 0.85, 0.8)


def quantize_awq(
    checkpoint: Path, out: Path, settings: AWQSettings, windows: torch.Tensor, *, work: Path | None = None, context: Context
) -> dict[str, float]:
    """Quantize every linear layer of every block of a dense checkpoint, with zero points; write an AWQ GEMM checkpoint to `out`.

    Scales are folded into the operation before a layer (`scale_pairs`). Embeddings and head stay as they are; so do weights that a mask prunes.

    Args:
        checkpoint: A dense checkpoint directory.
        out: A new directory. Its `layers.json` holds the relative error of every layer's output.
        settings: Groups, and whether grids are clipped.
        windows: Calibration token ids, int64 [count, length].
        work: Where the walk keeps its progress; None keeps none.
        context: Seed, device and callbacks.

    Returns:
        `fallback_layers` (0: rounding to nearest needs no inverse), and `scaled_pairs`: pairs for which a scale was better than none.

    Raises:
        Incompatible: A group size that does not fit the checkpoint.
    """
    source = open_checkpoint(checkpoint)
    scheme = WeightScheme(settings.bits, settings.group_size)
    planned = plan_schemes(source, bits=settings.bits, group_size=settings.group_size)

    def compress(block: Block) -> CompressedBlock:
        hessians = {path: shared.second_moment for shared in block.inputs for path in shared.layers}
        scaled = 0
        for pair in scale_pairs(block, source.family):
            hessian = hessians[pair.consumers[0]]
            weight = torch.cat([layer.weight for layer in pair.layers])
            scales = search_scales(weight, hessian, scheme, clip=settings.clip)
            if scales is not None:
                pair.fold(scales)
                hessians |= dict.fromkeys(pair.consumers, hessian / torch.outer(scales, scales))
                scaled += 1
        rounded = RoundedLayers(block, layout=awq_tensors)
        for shared in block.each_input():
            for paths, _ in group_by_scheme(block, shared.layers, planned):
                weight, hessian = stacked(block, paths), hessians[paths[0]]
                grid = fit_grid(weight, scheme, symmetric=False, hessian=hessian, shrinks=SHRINKS if settings.clip else NO_SHRINK)
                rounded.add(paths, weight, grid.quantize(weight, block.mask(paths)), grid, hessian)
        outcome = rounded.outcome()
        return replace(outcome, counts={**outcome.counts, "scaled_pairs": float(scaled)})

    config = {"quantization_config": awq_config(group_size=settings.group_size)}
    decides = {"method": "awq", "bits": settings.bits, "group_size": settings.group_size, "clip": settings.clip}
    return compress_blocks(checkpoint, out, windows, BlockMethod(compress, decides, config), work=work, context=context)


def search_scales(weight: torch.Tensor, hessian: torch.Tensor, scheme: WeightScheme, *, clip: bool = True) -> torch.Tensor | None:
    """Search the scale of each input channel under which rounding costs least.

    Candidates are s = a^α / m^(1−α), normalized to √(max·min) = 1, for α in `EXPONENTS`: a is the root mean square of a
    channel's input, m the mean of its weights relative to their group's largest (as in AutoAWQ); and s = a^α.

    Args:
        weight: [out, in]; rows of layers that share the input are stacked.
        hessian: [in, in], mean of x xᵀ.
        scheme: Bits and group size.
        clip: Whether the grids will be clipped: candidates are then scored on clipped grids.

    Returns:
        float32 [in]; None where no candidate is better than no scale.
    """
    activation = hessian.diagonal().sqrt()
    groups = weight.abs().unflatten(1, (-1, scheme.width(weight.shape[1])))
    magnitude = (groups / groups.amax(2, keepdim=True).clamp_min(1e-12)).flatten(1).mean(0)
    shrinks = COARSE_CLIP if clip else NO_SHRINK
    best, best_scales = _rounding_loss(weight, torch.ones_like(activation), hessian, scheme, shrinks), None
    for exponent in EXPONENTS:
        for candidate in (activation**exponent, activation**exponent / magnitude.clamp_min(1e-4) ** (1 - exponent)):
            bounded = candidate.clamp_min(1e-4)
            scales = bounded / (bounded.max() * bounded.min()).sqrt()
            loss = _rounding_loss(weight, scales, hessian, scheme, shrinks)
            if loss < best:
                best, best_scales = loss, scales
    return best_scales


def _rounding_loss(
    weight: torch.Tensor, scales: torch.Tensor, hessian: torch.Tensor, scheme: WeightScheme, shrinks: tuple[float, ...]
) -> float:
    """Return tr(ΔW·H·ΔWᵀ) of rounding W·diag(s) to nearest on a grid clipped as it will be, only more coarsely."""
    scaled = weight * scales
    moved = hessian / torch.outer(scales, scales)
    grid = fit_grid(scaled, scheme, symmetric=False, hessian=moved, shrinks=shrinks)
    delta = grid.dequantize(grid.quantize(scaled)).sub_(scaled)
    return float(output_power(delta, moved).sum())
