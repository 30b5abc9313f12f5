"""Wanda: a weight is worth its size times that of its input, among the weights of its row (Sun et al., arXiv 2306.11695)."""

import torch

from compression.pruning.selection import PRUNED, keep_n_of_m, keep_strongest


def wanda_scores(weight: torch.Tensor, mean_square: torch.Tensor) -> torch.Tensor:
    """Return |w_ij| · √mean(x_j²), float32 [out, in].

    Args:
        weight: [out, in].
        mean_square: Mean squares of the layer's inputs, [in]. Their roots are the paper's ‖x_j‖₂ up to a factor that all j share.
    """
    return weight.float().abs() * mean_square.sqrt()


def wanda(
    weight: torch.Tensor,
    mean_square: torch.Tensor,
    *,
    sparsity: float,
    group: tuple[int, int] | None = None,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune the lowest `wanda_scores` of each row.

    Args:
        weight: [out, in].
        mean_square: Mean squares of the layer's inputs, [in].
        sparsity: The share of each row to prune.
        group: (n, m): keep n of each m neighbours instead.
        kept: An earlier mask, bool [out, in]; what it prunes stays pruned and counts.

    Returns:
        The pruned weight and its mask (bool, True where a weight is kept), both [out, in].
    """
    scores = wanda_scores(weight, mean_square)
    if kept is not None:
        scores.masked_fill_(~kept, PRUNED)
    mask = keep_n_of_m(scores, *group) if group else keep_strongest(scores, sparsity)
    if kept is not None:
        mask &= kept
    return weight.masked_fill(~mask, 0), mask
