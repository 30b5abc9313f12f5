"""SparseGPT: prune column by column, and let the columns that follow compensate the error (Frantar and Alistarh, arXiv 2301.00774)."""

from collections.abc import Sequence

import torch

from compression.calibration.second_order import inverse_factor
from compression.pruning.selection import PRUNED, keep_n_of_m, keep_strongest

COLUMNS_PER_SELECTION = 128  # the weights to prune are chosen for so many columns at once, when all before them are final


def sparsegpt(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    *,
    rows: Sequence[int],
    sparsity: float,
    group: tuple[int, int] | None = None,
    kept: torch.Tensor | None = None,
    damp_percent: float = 0.01,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Prune layers that share an input, and move their other weights to keep the output.

    With H⁻¹ = UᵀU (`inverse_factor`), pruning w_ij costs w_ij² / U_jj² when all columns before j are final; the error w_ij / U_jj,
    times U_j,j+1…, is subtracted from the columns that follow: immediately within the run, in one product for the rest. The weights of
    an input that is always zero cost nothing and are pruned first.

    Args:
        weight: The layers' weights, stacked, float32 [out, in].
        hessian: The mean of x xᵀ over their inputs, float32 [in, in].
        rows: Output channels of each layer; the weights to prune are chosen layer by layer.
        sparsity: The share to prune of each run of `COLUMNS_PER_SELECTION` columns of a layer.
        group: (n, m): keep n of each m neighbours of a row instead.
        kept: An earlier mask, bool [out, in]; what it prunes stays pruned and counts.
        damp_percent: Of the mean of the Hessian's diagonal, added to it.

    Returns:
        The new weight with zeros where it is pruned, and the mask (bool, True where a weight is kept), both [out, in]. None where the
        Hessian cannot be inverted.
    """
    factor = inverse_factor(hessian, damp_percent=damp_percent)
    if factor is None:
        return None
    diagonal = factor.diagonal()
    cost_scale = torch.where(hessian.diagonal() > 0, diagonal.reciprocal().square(), 0).unsqueeze(1)
    columns = weight.T.clone(memory_format=torch.contiguous_format)  # [in, out]: a column is contiguous
    keep = torch.ones_like(columns, dtype=torch.bool) if kept is None else kept.T.clone(memory_format=torch.contiguous_format)
    run = COLUMNS_PER_SELECTION if group is None else COLUMNS_PER_SELECTION // group[1] * group[1]
    errors = torch.empty(run, columns.shape[1], dtype=columns.dtype, device=columns.device)
    scales = diagonal.tolist()

    def choose(span: slice) -> torch.Tensor:
        costs = (columns[span].square() * cost_scale[span]).masked_fill_(~keep[span], PRUNED)
        if group is not None:
            return keep_n_of_m(costs.T, *group).T
        layers = costs.split(tuple(rows), dim=1)
        return torch.cat([keep_strongest(layer.reshape(1, -1), sparsity).view(layer.shape) for layer in layers], dim=1)

    for start in range(0, len(columns), run):
        end = min(start + run, len(columns))
        for j in range(start, end):
            if (j - start) % (run if group is None else group[1]) == 0:
                span = slice(j, end if group is None else j + group[1])
                keep[span] &= choose(span)
            error = columns[j].masked_fill(keep[j], 0).div_(scales[j])
            columns[j].masked_fill_(~keep[j], 0)
            columns[j + 1 : end].addr_(factor[j, j + 1 : end], error, alpha=-1)
            errors[j - start] = error
        columns[end:].addmm_(factor[start:end, end:].T, errors[: end - start], alpha=-1)
    return columns.T.contiguous(), keep.T.contiguous()
