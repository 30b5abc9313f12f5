"""Rounding to nearest: the control that every other method has to beat. No calibration data."""

from collections.abc import Mapping
from pathlib import Path

import torch

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.layouts import BITS, gptq_tensors
from compression.checkpoints.streaming import rewrite_linears
from compression.context import Context
from compression.errors import Incompatible
from compression.quantization.grid import NO_SHRINK, SHRINKS, fit_grid
from compression.quantization.rounding import quantized_linear
from compression.quantization.settings import OnIndivisible, Overrides, gptq_config, plan_schemes


def quantize_rtn(
    checkpoint: Path,
    out: Path,
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    mse: bool = False,
    layers: Overrides | None = None,
    on_indivisible: OnIndivisible = "refuse",
    context: Context,
) -> dict[str, float]:
    """Round every linear layer of every block of a dense checkpoint to nearest; write a checkpoint in the GPTQ layout to `out`.

    group_size, layers, on_indivisible  as of `quantize_gptq`
    mse  shrink each group's range where that lowers the error of its weights, instead of the plain min/max
    Tensors stream through one at a time; masks are carried along, and zeros stay zero on any grid. Embeddings and head stay as they are.

    Returns `fallback_layers`: layers that got a smaller group (`on_indivisible`).
    Raises Incompatible for bits or a group size that do not fit, or a checkpoint whose blocks are not of linear layers.
    """
    source = open_checkpoint(checkpoint)
    if bits not in BITS:
        raise Incompatible(f"the GPTQ layout has {', '.join(map(str, BITS))} bits, not {bits}", key="bits")
    planned = plan_schemes(source, bits=bits, group_size=group_size, layers=layers, on_indivisible=on_indivisible)

    def rewrite(path: str, weight: torch.Tensor) -> Mapping[str, torch.Tensor]:
        codes = planned[path]
        if codes is None:
            return {"weight": weight}
        grid = fit_grid(weight, codes, symmetric=symmetric, shrinks=SHRINKS if mse else NO_SHRINK)
        return gptq_tensors(quantized_linear(grid.quantize(weight.float()), grid))

    config = gptq_config(planned, bits=bits, group_size=group_size, symmetric=symmetric, layers=layers)
    rewrite_linears(checkpoint, out, rewrite, config={"quantization_config": config}, context=context)
    smaller = [path for path, codes in planned.items() if codes is not None and codes.shrunk]
    for path in smaller:
        context.warn(f"{path}: its width is not divided by group_size {group_size}; it has a smaller one")
    return {"fallback_layers": float(len(smaller))}
