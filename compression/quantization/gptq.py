"""GPTQ: round weights column by column, and let the columns still to come make up for the error (Frantar et al., arXiv 2210.17323)."""

from pathlib import Path

import torch

from compression.calibration.calibration import CompressedBlock, compress_blocks
from compression.calibration.second_order import inverse_factor, stacked
from compression.calibration.walk import Block
from compression.checkpoints.checkpoint import open_checkpoint
from compression.context import Context
from compression.errors import Incompatible
from compression.quantization.grid import NO_SHRINK, SHRINKS, Grid, fit_grid, round_to_codes
from compression.quantization.rounding import RoundedLayers, group_by_scheme
from compression.quantization.settings import OnIndivisible, Overrides, gptq_config, plan_schemes

COLUMNS_PER_UPDATE = 64  # columns whose errors reach the rest of the matrix in one product


def quantize_gptq(
    checkpoint: Path,
    out: Path,
    windows: torch.Tensor,
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    damp_percent: float = 0.01,
    act_order: bool = True,
    mse: bool = True,
    layers: Overrides | None = None,
    on_indivisible: OnIndivisible = "refuse",
    work: Path | None = None,
    context: Context,
) -> dict[str, float]:
    """Quantize every linear layer of every block of a dense checkpoint; write a GPTQ checkpoint to `out`.

    windows       calibration token ids, int64 [count, length]
    group_size    input channels that share a scale; -1 for a row
    damp_percent  of the mean of the Hessian's diagonal, added to the diagonal
    act_order     take columns by falling second moment of their input, with static groups: the grids are fitted before, so
                  that groups stay runs of neighbouring channels
    mse           shrink each group's range where that lowers the error of its output, instead of the plain min/max
    layers, on_indivisible  bits and groups by pattern, and what becomes of widths that the group does not divide: `plan_schemes`
    work          where the walk keeps its progress
    Embeddings and head stay as they are; weights that a mask prunes stay zero, and the others make up for them.

    Returns `fallback_layers`: layers in which some columns (inputs that are always zero) or all (a Hessian that cannot be
    inverted) were rounded to nearest instead, or that got a smaller group. `layers.json` tells the relative error of every layer's output.
    Raises Incompatible for bits or a group size that do not fit.
    """
    source = open_checkpoint(checkpoint)
    if bits not in (2, 3, 4, 8):
        raise Incompatible(f"GPTQ has 2, 3, 4 or 8 bits, not {bits}", key="bits")
    planned = plan_schemes(source, bits=bits, group_size=group_size, layers=layers, on_indivisible=on_indivisible)

    def compress(block: Block) -> CompressedBlock:
        rounded = RoundedLayers(block)
        for shared in block.each_input():
            hessian = shared.second_moment
            order = column_order(hessian) if act_order else None
            factor = inverse_factor(hessian, damp_percent=damp_percent, order=order)
            dead = int((hessian.diagonal() == 0).sum())
            for paths, codes in group_by_scheme(block, shared.layers, planned):
                if factor is None:
                    rounded.fall_back(paths, "the Hessian cannot be inverted; rounded to nearest")
                elif dead:
                    rounded.fall_back(paths, f"{dead} input channels are zero in all calibration data; rounded to nearest there")
                if codes.shrunk:
                    rounded.fall_back(paths, f"its width takes groups of {codes.group_size}, not {group_size}")
                weight, mask = stacked(block, paths), block.mask(paths)
                grid = fit_grid(weight, codes, symmetric=symmetric, hessian=hessian, shrinks=SHRINKS if mse else NO_SHRINK)
                quantized = grid.quantize(weight, mask) if factor is None else gptq(weight, grid, factor, order=order, mask=mask)
                rounded.add(paths, weight, quantized, grid, hessian)
        return rounded.outcome()

    config = gptq_config(planned, bits=bits, group_size=group_size, symmetric=symmetric, layers=layers, damp_percent=damp_percent)
    codes = {module: codes and [codes.bits, codes.group_size] for module, codes in planned.items()}
    settings = {"method": "gptq", "codes": codes, "symmetric": symmetric, "damp_percent": damp_percent, "act_order": act_order, "mse": mse}
    return compress_blocks(
        checkpoint, out, windows, compress, settings=settings, config={"quantization_config": config}, work=work, context=context
    )


def column_order(hessian: torch.Tensor) -> torch.Tensor:
    """Input channels by falling second moment, int64 [in] (act-order)."""
    return hessian.diagonal().argsort(descending=True, stable=True)


def gptq(
    weight: torch.Tensor, grid: Grid, factor: torch.Tensor, *, order: torch.Tensor | None = None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Codes of `weight` on `grid`: uint8 [out, in], columns in storage order.

    weight  [out, in]; rows of several layers that share an input may be stacked
    factor  `inverse_factor` of the inputs' second moment, in the same `order`
    mask    bool [out, in]: a weight that it does not keep becomes zero, and the others make up for that too
    Column j is rounded; its error over U_jj, times U_j,j+1…, is taken off the columns that follow: at once within
    `COLUMNS_PER_UPDATE`, in one product for the rest.
    """

    def columns(matrix: torch.Tensor) -> torch.Tensor:
        """[out, in] -> [in, out] in the order in which columns are taken, each contiguous; never the caller's memory."""
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
