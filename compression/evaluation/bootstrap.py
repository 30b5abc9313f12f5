"""How sure a figure is: intervals from the bootstrap over its items (Efron 1979), alone and in comparison with another model. Imports no torch.

A metric is transform(sum of sums / sum of counts) over items (compression/evaluation/findings.py). Bootstrap samples draw as many items as
there are, with replacement; the interval is the middle 95 % of the metric's values on them (percentile method). In a comparison both models are
scored on the same drawn items, so what makes an item hard for both cancels out.

The interval is about other text and questions of the same kind. Windows are drawn whole, so dependence within a window is respected. Where no
item differs there is no spread: two models that answer every question alike have a difference of 0, from 0 to 0, however few questions there were.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from compression.evaluation.findings import Items, exponential

BOOTSTRAP_VERSION = 1  # part of the key of records that hold intervals: raise it when they change
RESAMPLES = 10_000
_CHUNK = 2**22  # drawn items held at once


@dataclass(frozen=True)
class Interval:
    """Of 95 %."""

    low: float
    high: float


def value(items: Items) -> float:
    """The metric that the items make."""
    mean = sum(items.sums) / sum(items.counts)
    return exponential(mean) if items.transform == "exp" else float(mean)


def paired(one: Items, other: Items) -> bool:
    """Whether they are of the same items, as far as counts tell; there must be two or more."""
    return len(one.counts) > 1 and one.counts == other.counts and one.transform == other.transform


def resample(seed: str, *items: Items, resamples: int = RESAMPLES) -> list[np.ndarray]:
    """The values of metrics on bootstrap samples, the same samples for all of them: one float64 [resamples] for each.

    seed   any text: equal ones draw the same
    items  of the same number
    """
    count = len(items[0].sums)
    random = np.random.default_rng(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:16], "big"))
    sums = [np.array(each.sums, dtype=np.float64) for each in items]
    counts = [np.array(each.counts, dtype=np.float64) for each in items]
    means: list[list[np.ndarray]] = [[] for _ in items]
    size = max(1, _CHUNK // count)
    for start in range(0, resamples, size):
        drawn = random.integers(0, count, size=(min(size, resamples - start), count))
        for number in range(len(items)):
            means[number].append(_sums(sums[number], drawn) / _sums(counts[number], drawn))
    joined = [np.concatenate(parts) for parts in means]
    with np.errstate(over="ignore"):  # beyond the range of floats it is infinite
        return [np.exp(mean) if each.transform == "exp" else mean for mean, each in zip(joined, items, strict=True)]


def _sums(values: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    if (values == values[0]).all():
        return np.full(len(drawn), values[0] * drawn.shape[1])
    return values[drawn].sum(1)


def middle(sample: np.ndarray) -> Interval:
    """The middle 95 % of bootstrap values. Between infinite ones nothing is interpolated: the value beyond them counts."""
    finite = bool(np.isfinite(sample).all())
    low = np.quantile(sample, 0.025, method="linear" if finite else "lower")
    high = np.quantile(sample, 0.975, method="linear" if finite else "higher")
    return Interval(float(low), float(high))


def interval_figures(name: str, items: Items, seed: str) -> dict[str, float]:
    """{name}_low and {name}_high, from two items on."""
    if len(items.sums) < 2:
        return {}
    found = middle(resample(seed, items)[0])
    return {f"{name}_low": found.low, f"{name}_high": found.high}


def comparison_figures(name: str, mine: Items, base: Items, seed: str) -> dict[str, float]:
    """What became of a metric: {name}_delta (mine - base), or of an `exp` {name}_ratio (mine / base), each with _low and _high.

    Without items that can be paired there is no interval.
    """
    ratio = mine.transform == "exp"
    figure = f"{name}_ratio" if ratio else f"{name}_delta"
    figures = {figure: value(mine) / value(base) if ratio else value(mine) - value(base)}
    if paired(mine, base):
        one, other = resample(seed, mine, base)
        with np.errstate(invalid="ignore", divide="ignore"):  # of two infinite perplexities there is no ratio: not a number
            found = middle(one / other if ratio else one - other)
        figures |= {f"{figure}_low": found.low, f"{figure}_high": found.high}
    return figures
