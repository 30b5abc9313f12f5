"""The sparsity of each block: blocks with more outliers stay denser (OWL, Yin et al., arXiv 2310.05175)."""

from collections.abc import Iterable, Mapping

import torch

OUTLIER = 5.0  # times the mean score; the paper's M
SPREAD = 0.08  # blocks lie within a range of twice this; the paper's λ


def outlier_ratio(scores: Iterable[torch.Tensor]) -> float:
    """Return the share of a block's scores (0 or more, a tensor a layer) that exceed `OUTLIER` times the mean of their layer."""
    outliers, weights = 0, 0
    for score in scores:
        outliers += int((score > OUTLIER * score.mean()).sum())
        weights += score.numel()
    return outliers / weights


def allocate(ratios: Mapping[str, float], weights: Mapping[str, int], sparsity: float) -> dict[str, float]:
    """Return the sparsity of each block, lower the more outliers it has.

    Sparsities fall linearly with the ratio over a range of 2 `SPREAD`, less where `sparsity` is too near 0 or 1 for that.

    Args:
        ratios: The ratio of outliers (`outlier_ratio`) by block.
        weights: The number of weights by block.
        sparsity: The mean over all weights.
    """
    spread = min(SPREAD, sparsity / 2, (1 - sparsity) / 2)
    width = max(ratios.values()) - min(ratios.values())
    if width == 0:
        return dict.fromkeys(ratios, sparsity)
    mean = sum(ratio * weights[block] for block, ratio in ratios.items()) / sum(weights[block] for block in ratios)
    return {block: sparsity - 2 * spread * (ratio - mean) / width for block, ratio in ratios.items()}
