"""GPTQ: round weights column by column, and let the columns still to come make up for the error (Frantar et al., arXiv 2210.17323)."""

from pathlib import Path

import torch

from compression.calibration.calibration import BlockMethod, CompressedBlock, compress_blocks
from compression.calibration.second_order import inverse_factor, stacked
from compression.calibration.walk import Block
from compression.checkpoints.checkpoint import open_checkpoint
from compression.context import Context
from compression.quantization.grid import NO_SHRINK, SHRINKS, Grid, fit_grid, round_to_codes
from compression.quantization.rounding import RoundedLayers, group_by_scheme
from compression.quantization.settings import GPTQSettings, gptq_config, planned_schemes

COLUMNS_PER_UPDATE = 64  # columns whose errors reach the rest of the matrix in one product


def quantize_gptq(
    checkpoint: Path, out: Path, settings: GPTQSettings, windows: torch.Tensor, *, work: Path | None = None, context: Context
) -> dict[str, float]:
    """Quantize every linear layer of every block of a dense checkpoint; write a GPTQ checkpoint to `out`.

    Embeddings and head stay as they are; weights that a mask prunes stay zero, and the others make up for them.

    Args:
        checkpoint: A dense checkpoint directory.
        out: A new directory. Its `layers.json` holds the relative error of every layer's output.
        settings: Bits and groups, and how the codes are searched.
        windows: Calibration token ids, int64 [count, length].
        work: Where the walk keeps its progress; None keeps none.
        context: Seed, device and callbacks.

    Returns:
        `fallback_layers`: layers in which some columns (inputs that are always zero) or all (a Hessian that cannot be inverted) were
        rounded to nearest instead, or that got a smaller group.

    Raises:
        Incompatible: Bits or a group size do not fit the checkpoint.
    """
    planned = planned_schemes(open_checkpoint(checkpoint), settings)

    def compress(block: Block) -> CompressedBlock:
        rounded = RoundedLayers(block)
        for shared in block.each_input():
            hessian = shared.second_moment
            order = column_order(hessian) if settings.act_order else None
            factor = inverse_factor(hessian, damp_percent=settings.damp_percent, order=order)
            dead = int((hessian.diagonal() == 0).sum())
            for paths, scheme in group_by_scheme(block, shared.layers, planned):
                if factor is None:
                    rounded.fall_back(paths, "the Hessian cannot be inverted; rounded to nearest")
                elif dead:
                    rounded.fall_back(paths, f"{dead} input channels are zero in all calibration data; rounded to nearest there")
                if scheme.shrunk:
                    rounded.fall_back(paths, f"its width takes groups of {scheme.group_size}, not {settings.group_size}")
                weight, mask = stacked(block, paths), block.mask(paths)
                grid = fit_grid(
                    weight, scheme, symmetric=settings.symmetric, hessian=hessian, shrinks=SHRINKS if settings.mse else NO_SHRINK
                )
                quantized = grid.quantize(weight, mask) if factor is None else gptq(weight, grid, factor, order=order, mask=mask)
                rounded.add(paths, weight, quantized, grid, hessian)
        return rounded.outcome()

    config = gptq_config(planned, settings, damp_percent=settings.damp_percent)
    decides = {
        "method": "gptq",
        "codes": {module: scheme and [scheme.bits, scheme.group_size] for module, scheme in planned.items()},
        **settings.model_dump(include={"symmetric", "damp_percent", "act_order", "mse"}),
    }
    method = BlockMethod(compress, decides, {"quantization_config": config})
    return compress_blocks(checkpoint, out, windows, method, work=work, context=context)


def column_order(hessian: torch.Tensor) -> torch.Tensor:
    """Sort input channels by falling second moment, int64 [in] (act-order)."""
    return hessian.diagonal().argsort(descending=True, stable=True)


def gptq(
    weight: torch.Tensor, grid: Grid, factor: torch.Tensor, *, order: torch.Tensor | None = None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Round weights column by column, each time moving the error to the columns still to come.

    Column j is rounded; its error over U_jj, times U_j,j+1…, is taken off the columns that follow: at once within
    `COLUMNS_PER_UPDATE`, in one product for the rest.

    Args:
        weight: [out, in]; rows of several layers that share an input may be stacked.
        grid: The scales and zeros of every group of `weight`.
        factor: `inverse_factor` of the inputs' second moment, in the same `order`.
        order: The input channels in the order in which they are rounded, int64 [in]; None for storage order.
        mask: bool [out, in]; a weight that it does not keep becomes zero, and the others make up for that too.

    Returns:
        Codes, uint8 [out, in], columns in storage order.
    """

    def columns(matrix: torch.Tensor) -> torch.Tensor:
        """[out, in] -> [in, out] in the order of rounding, each row contiguous; never the caller's memory."""
        return matrix.T[order] if order is not None else matrix.T.clone(memory_format=torch.contiguous_format)

    rows, (scales, zeros) = columns(weight), map(columns, grid.columns())
    pruned = None if mask is None else columns(~mask)
    codes = torch.empty_like(rows)
    errors = torch.empty(COLUMNS_PER_UPDATE, rows.shape[1], dtype=rows.dtype, device=rows.device)
    diagonal = factor.diagonal().tolist()
    for start in range(0, len(rows), COLUMNS_PER_UPDATE):
        end = min(start + COLUMNS_PER_UPDATE, len(rows))
        for j in range(start, end):
            codes[j] = round_to_codes(rows[j], scales[j], zeros[j], grid.bits)
            if pruned is not None:
                codes[j] = torch.where(pruned[j], zeros[j], codes[j])
            error = (codes[j] - zeros[j]).mul_(scales[j]).sub_(rows[j]).div_(-diagonal[j])
            rows[j + 1 : end].addr_(factor[j, j + 1 : end], error, alpha=-1)
            errors[j - start] = error
        rows[end:].addmm_(factor[start:end, end:].T, errors[: end - start], alpha=-1)
    if order is not None:
        codes = torch.empty_like(codes).index_copy_(0, order, codes)
    return codes.T.to(torch.uint8).contiguous()
