"""Which layers deserve more bits: what rounding each of them alone does to its output, at every width, and how to spend a budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from compression.calibration.second_order import output_power, stacked
from compression.calibration.walk import walk
from compression.checkpoints.checkpoint import open_checkpoint
from compression.context import Context
from compression.quantization.grid import NO_SHRINK, fit_grid
from compression.quantization.rounding import group_by_scheme
from compression.quantization.settings import plan_schemes

WIDTHS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Sensitivity:
    """What rounding does to a linear layer.

    Attributes:
        weights: The number of its weights.
        errors: E‖(Q(W) − W)x‖² / E‖Wx‖² by bits, over the calibration inputs of the unquantized model, weights rounded to nearest.
    """

    weights: int
    errors: Mapping[int, float]


def measure_sensitivity(
    checkpoint: Path,
    windows: torch.Tensor,
    *,
    group_size: int = 128,
    symmetric: bool = True,
    widths: Sequence[int] = WIDTHS,
    context: Context,
) -> dict[str, Sensitivity]:
    """Measure the sensitivity of every linear layer of every block of a dense checkpoint.

    Args:
        checkpoint: A dense checkpoint directory.
        windows: Calibration token ids, int64 [count, length].
        group_size: Input channels that share a scale; -1 for a row.
        symmetric: Whether the grids have no zero points.
        widths: The numbers of bits to try.
        context: Device and callbacks.

    Returns:
        The sensitivity by the layer's path in the model.

    Raises:
        EdgepressError: A group size that does not fit, and what `Walk` raises.
    """
    source = open_checkpoint(checkpoint)
    plans = {bits: plan_schemes(source, bits=bits, group_size=group_size) for bits in widths}
    found: dict[str, Sensitivity] = {}
    for block in walk(source, windows, context=context):
        for shared in block.each_input():
            hessian = shared.second_moment
            for paths, _ in group_by_scheme(block, shared.layers, plans[widths[0]]):
                weight = stacked(block, paths)
                rows = [block.linear(path).out_features for path in paths]
                powers = [float(part.sum()) for part in output_power(weight, hessian).split(rows)]
                errors: dict[str, dict[int, float]] = {path: {} for path in paths}
                for bits, plan in plans.items():
                    codes = plan[f"{block.name}.{paths[0]}"]
                    assert codes is not None
                    grid = fit_grid(weight, codes, symmetric=symmetric, shrinks=NO_SHRINK)
                    lost = output_power(grid.dequantize(grid.quantize(weight)) - weight, hessian).split(rows)
                    for path, power, loss in zip(paths, powers, lost, strict=True):
                        errors[path][bits] = float(loss.sum()) / power if power > 0 else 0.0
                for path in paths:
                    found[f"{block.name}.{path}"] = Sensitivity(block.linear(path).weight.numel(), errors[path])
    return found


def allocate_bits(layers: Mapping[str, Sensitivity], average_bits: float) -> dict[str, int]:
    """Choose the bits of every layer, at most `average_bits` a weight, so that the relative errors add up to little.

    Greedy: from the fewest bits, the step that removes most error for its bits comes next. Every layer's relative error counts the
    same, which is an assumption: the effect of an error on later layers is not considered.

    Raises:
        ValueError: The average is below the fewest bits.
    """
    chosen = {path: min(layer.errors) for path, layer in layers.items()}
    total = sum(layer.weights for layer in layers.values())
    budget = average_bits * total - sum(layers[path].weights * bits for path, bits in chosen.items())
    if budget < 0:
        raise ValueError(f"an average of {average_bits} bits is below the fewest, {min(chosen.values())}")
    while True:
        steps = [
            ((layer.errors[chosen[path]] - layer.errors[bits]) / (layer.weights * (bits - chosen[path])), path, bits)
            for path, layer in layers.items()
            for bits in layer.errors
            if bits > chosen[path] and layer.weights * (bits - chosen[path]) <= budget
        ]
        if not steps:
            return chosen
        _, path, bits = max(steps, key=lambda step: (step[0], step[1], -step[2]))
        budget -= layers[path].weights * (bits - chosen[path])
        chosen[path] = bits
