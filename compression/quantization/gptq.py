"""GPTQ: round weights column by column, and let the columns still to come make up for the error (Frantar et al., arXiv 2210.17323)."""

from collections.abc import Mapping
from pathlib import Path

import torch

from compression.calibration import Block, SharedInput, compress_blocks
from compression.checkpoint import open_checkpoint
from compression.context import Context
from compression.errors import Incompatible
from compression.quantization import check_group_size
from compression.quantization.grid import SHRINKS, Grid, fit_grid, round_to_codes
from compression.quantization.layouts import gptq_config, gptq_tensors, quantized_linear

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
    context: Context,
) -> dict[str, float]:
    """Quantize every linear layer of every block of a dense checkpoint; write a GPTQ checkpoint to `out`.

    windows       calibration token ids, int64 [count, length]
    damp_percent  of the mean of the Hessian's diagonal, added to the diagonal
    act_order     take columns by falling second moment of their input, with static groups: the grids are fitted before, so
                  that groups stay runs of neighbouring channels
    mse           shrink each group's range where that lowers the error of its output, instead of the plain min/max
    Embeddings and head stay as they are.

    Returns `fallback_layers`: layers in which some columns (inputs that are always zero) or all (a Hessian that cannot be
    inverted) were rounded to nearest instead.
    Raises Incompatible for bits or a group size that do not fit.
    """
    source = open_checkpoint(checkpoint)
    if bits not in (2, 3, 4, 8):
        raise Incompatible(f"GPTQ has 2, 3, 4 or 8 bits, not {bits}", key="bits")
    check_group_size(source, group_size, bits)
    fallbacks: list[str] = []

    def compress(block: Block) -> Mapping[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for shared in block.inputs:
            weights = [block.linear(path).weight for path in shared.layers]
            stacked = torch.cat(weights).float()
            grid = fit_grid(
                stacked, bits=bits, group_size=group_size, symmetric=symmetric, gram=shared.gram, shrinks=SHRINKS if mse else (1.0,)
            )
            order = column_order(shared.gram) if act_order else None
            factor = inverse_factor(shared.gram, damp_percent=damp_percent, order=order)
            codes = grid.quantize(stacked) if factor is None else gptq(stacked, grid, factor, order=order)
            note_fallback([f"{block.name}.{path}" for path in shared.layers], shared, inverted=factor is not None)
            start = 0
            for path, weight in zip(shared.layers, weights, strict=True):
                layer = quantized_linear(codes, grid, rows=slice(start, start + len(weight)))
                start += len(weight)
                weight.copy_(layer.dequantize())
                tensors |= {f"{path}.{suffix}": tensor for suffix, tensor in gptq_tensors(layer).items()}
        return tensors

    def note_fallback(layers: list[str], shared: SharedInput, *, inverted: bool) -> None:
        dead = int((shared.gram.diagonal() == 0).sum())
        if not inverted:
            context.warn(f"{', '.join(layers)}: the Hessian cannot be inverted; rounded to nearest")
        elif dead:
            context.warn(f"{', '.join(layers)}: {dead} input channels are zero in all calibration data; rounded to nearest there")
        if dead or not inverted:
            fallbacks.extend(layers)

    config = gptq_config(bits=bits, group_size=group_size, symmetric=symmetric, damp_percent=damp_percent)
    compress_blocks(checkpoint, out, windows, compress, config={"quantization_config": config}, context=context)
    return {"fallback_layers": float(len(fallbacks))}


def column_order(gram: torch.Tensor) -> torch.Tensor:
    """Input channels by falling second moment, int64 [in] (act-order)."""
    return gram.diagonal().argsort(descending=True, stable=True)


def inverse_factor(gram: torch.Tensor, *, damp_percent: float, order: torch.Tensor | None = None) -> torch.Tensor | None:
    """The upper triangular U with H⁻¹ = UᵀU for the damped H, columns in `order`; None where H has no inverse.

    gram  [in, in], mean of x xᵀ. A channel that is always zero (nothing to make up for, nothing to make up with) gets the mean
          of the diagonal, which leaves it out of every update.
    H = VVᵀ with V upper triangular is the Cholesky factor of H read backwards, and U = V⁻¹: one factorization and one triangular inverse.
    """
    h = gram.clone()
    diagonal = h.diagonal()
    mean = diagonal.mean()
    diagonal[diagonal == 0] = mean
    diagonal += damp_percent * mean
    if order is not None:
        h = h[order][:, order]
    lower, info = torch.linalg.cholesky_ex(h.flip(0, 1))
    if info.item() or not torch.isfinite(lower).all():
        return None
    upper = lower.flip(0, 1)
    return torch.linalg.solve_triangular(upper, torch.eye(len(upper), device=h.device, dtype=h.dtype), upper=True)


def gptq(weight: torch.Tensor, grid: Grid, factor: torch.Tensor, *, order: torch.Tensor | None = None) -> torch.Tensor:
    """Codes of `weight` on `grid`: uint8 [out, in], columns in storage order.

    weight  [out, in]; rows of several layers that share an input may be stacked
    factor  `inverse_factor` of the inputs' second moment, in the same `order`
    Column j is rounded; its error over U_jj, times U_j,j+1…, is taken off the columns that follow: at once within
    `COLUMNS_PER_UPDATE`, in one product for the rest.
    """
    scales, zeros = (part.T for part in grid.columns())
    rows = weight.T
    if order is not None:
        rows, scales, zeros = rows[order], scales[order], zeros[order]
    rows, scales, zeros = rows.contiguous(), scales.contiguous(), zeros.contiguous()  # [in, out]: a column is contiguous
    if order is None:
        rows = rows.clone()
    codes = torch.empty_like(rows)
    errors = torch.empty(COLUMNS_PER_UPDATE, rows.shape[1], dtype=rows.dtype, device=rows.device)
    diagonal = factor.diagonal().tolist()
    for start in range(0, len(rows), COLUMNS_PER_UPDATE):
        end = min(start + COLUMNS_PER_UPDATE, len(rows))
        for j in range(start, end):
            codes[j] = round_to_codes(rows[j], scales[j], zeros[j], grid.bits)
            error = (codes[j] - zeros[j]).mul_(scales[j]).sub_(rows[j]).div_(-diagonal[j])
            rows[j + 1 : end].addr_(factor[j, j + 1 : end], error, alpha=-1)
            errors[j - start] = error
        rows[end:].addmm_(factor[start:end, end:].T, errors[: end - start], alpha=-1)
    stored = torch.empty_like(codes) if order is not None else codes
    if order is not None:
        stored[order] = codes
    return stored.T.to(torch.uint8).contiguous()
