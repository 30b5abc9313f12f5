"""How sparse each block gets: blocks with more outliers stay denser (OWL, Yin et al., arXiv 2310.05175)."""

from collections.abc import Iterable, Mapping

import torch

OUTLIER = 5.0  # times the mean score; the paper's M
SPREAD = 0.08  # blocks lie within a range of twice this; the paper's λ


def outlier_ratio(scores: Iterable[torch.Tensor]) -> float:
    """The share of a layer's scores, each 0 or more, that exceed `OUTLIER` times the layer's mean, over all layers of a block."""
    outliers, weights = 0, 0
    for score in scores:
        outliers += int((score > OUTLIER * score.mean()).sum())
        weights += score.numel()
    return outliers / weights


def allocate(ratios: Mapping[str, float], weights: Mapping[str, int], sparsity: float) -> dict[str, float]:
    """The sparsity of each block: `sparsity` on the average over weights, and the lower the more outliers a block has.

    ratios   of outliers, by block (`outlier_ratio`)
    weights  how many a block has
    Sparsities fall linearly with the ratio over a range of 2 `SPREAD`, less where `sparsity` is too near 0 or 1 for that.
    """
    spread = min(SPREAD, sparsity / 2, (1 - sparsity) / 2)
    width = max(ratios.values()) - min(ratios.values())
    if width == 0:
        return dict.fromkeys(ratios, sparsity)
    mean = sum(ratio * weights[block] for block, ratio in ratios.items()) / sum(weights[block] for block in ratios)
    return {block: sparsity - 2 * spread * (ratio - mean) / width for block, ratio in ratios.items()}
