"""Choose the weights that stay by their scores: the highest, in the given pattern. Of equal scores the later stays."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

PRUNED = -1.0  # the score of a weight that is already pruned; all others are 0 or more


def keep_strongest(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Prune the share `sparsity` of each row, rounded to a number of weights, the lowest scores first; bool like `scores` [rows, n]."""
    count = round(sparsity * scores.shape[1])
    if count == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count, dim=1, keepdim=True).values
    below = (scores < threshold).sum(1, keepdim=True)
    return _keep_above(scores, threshold, count - below)


def keep_n_of_m(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Keep the n highest scores of each m neighbours in a row; bool like `scores` [rows, in], where m divides `in`."""
    return keep_strongest(scores.reshape(-1, m), (m - n) / m).view(scores.shape)


def keep_strongest_overall(scores: Mapping[str, Callable[[], torch.Tensor]], sparsity: float) -> Iterator[tuple[str, torch.Tensor]]:
    """Keep the highest scores of all layers together.

    The threshold is exact. Floats of one sign order as their bits do: two passes of a radix selection, 16 bits each, find it.

    Args:
        scores: By layer, a function that gives float32 scores. Each is called three times; one layer is in memory at a time.
        sparsity: The share of all weights to prune.

    Yields:
        The name and mask (bool like its scores) of each layer, in order.
    """

    def keys() -> Iterator[torch.Tensor]:
        for score in scores.values():
            yield _order(score())

    high = _histogram((key >> 16 for key in keys()), 1 << 15)
    count = round(sparsity * int(high.sum()))
    upper, left = _locate(high, count)
    lower, ties = _locate(_histogram((key[key >> 16 == upper] & 0xFFFF for key in keys()), 1 << 16), left)
    threshold = torch.tensor(upper << 16 | lower)
    for name, score in scores.items():
        key = _order(score())
        flat = key.view(1, -1)
        yield name, _keep_above(flat, threshold, torch.tensor(ties)).view(key.shape)
        ties -= min(ties, int((key == threshold).sum()))


def _keep_above(scores: torch.Tensor, threshold: torch.Tensor, ties: torch.Tensor) -> torch.Tensor:
    """Keep scores above a row's threshold, and of those that equal it all but the first `ties`."""
    tied = scores == threshold
    return (scores > threshold) | (tied & (tied.cumsum(1) > ties))


def _order(scores: torch.Tensor) -> torch.Tensor:
    """Return integers from 0 to 2³¹ - 1 that order as the scores do; PRUNED comes first."""
    return (scores.float().contiguous().view(torch.int32) + 1).masked_fill_(scores < 0, 0)


def _histogram(values: Iterable[torch.Tensor], bins: int) -> torch.Tensor:
    total = torch.zeros(bins, dtype=torch.int64)
    for part in values:
        total += torch.bincount(part.flatten(), minlength=bins).cpu()
    return total


def _locate(histogram: torch.Tensor, count: int) -> tuple[int, int]:
    """Return the bin in which the `count`-th smallest value lies, and its rank there (from 1; 0 for a count of 0)."""
    upto = histogram.cumsum(0)
    found = int(torch.searchsorted(upto, count))
    return found, count - (int(upto[found - 1]) if found else 0)
