"""Rounding to nearest: the control that every other method has to beat. No calibration data."""

from collections.abc import Mapping
from pathlib import Path

import torch

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.layouts import gptq_tensors
from compression.checkpoints.streaming import rewrite_linears
from compression.context import Context
from compression.quantization.grid import NO_SHRINK, SHRINKS, fit_grid
from compression.quantization.rounding import quantized_linear
from compression.quantization.settings import RTNSettings, gptq_config, planned_schemes


def quantize_rtn(checkpoint: Path, out: Path, settings: RTNSettings, *, context: Context) -> dict[str, float]:
    """Round every linear layer of every block of a dense checkpoint to nearest; write a checkpoint in the GPTQ layout to `out`.

    Tensors stream through one at a time; masks are carried along, and zeros stay zero on any grid. Embeddings and head stay as they are.

    Args:
        checkpoint: A dense checkpoint directory.
        out: A new directory.
        settings: Bits and groups.
        context: Seed, device and callbacks.

    Returns:
        `fallback_layers`: layers that got a smaller group (`on_indivisible`).

    Raises:
        Incompatible: Bits or a group size do not fit, or the checkpoint's blocks do not consist of linear layers.
    """
    planned = planned_schemes(open_checkpoint(checkpoint), settings)

    def rewrite(path: str, weight: torch.Tensor) -> Mapping[str, torch.Tensor]:
        scheme = planned[path]
        if scheme is None:
            return {"weight": weight}
        grid = fit_grid(weight, scheme, symmetric=settings.symmetric, shrinks=SHRINKS if settings.mse else NO_SHRINK)
        return gptq_tensors(quantized_linear(grid.quantize(weight.float()), grid))

    config = gptq_config(planned, settings)
    rewrite_linears(checkpoint, out, rewrite, config={"quantization_config": config}, context=context)
    smaller = [path for path, scheme in planned.items() if scheme is not None and scheme.shrunk]
    for path in smaller:
        context.warn(f"{path}: its width is not divided by group_size {settings.group_size}; it has a smaller one")
    return {"fallback_layers": float(len(smaller))}
