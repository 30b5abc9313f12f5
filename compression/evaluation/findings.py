"""What a measurement brings. Imports no torch."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Transform = Literal["mean", "exp"]


def exponential(value: float) -> float:
    """e**value, as a perplexity is of a loss: infinite where that is beyond the range of floats."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class Items:
    """What a metric is made of, item by item (a window of text, a question): transform(sum of sums / sum of counts).

    sums       one number per item: the negative log-likelihood of a window's tokens, 1 for a question answered right
    counts     what each of them is a sum over: the window's tokens, 1 for a question
    transform  mean (nothing more), or exp of it (perplexity)
    Models measured on the same items can be compared pair by pair (compression/evaluation/bootstrap.py).
    """

    sums: tuple[float, ...]
    counts: tuple[float, ...]
    transform: Transform = "mean"

    def digest(self) -> str:
        """Of the numbers: a seed that is theirs."""
        return hashlib.sha256(json.dumps([self.sums, self.counts, self.transform]).encode()).hexdigest()

    @staticmethod
    def read(document: Mapping[str, Any]) -> "Items":
        """Items as they stand in JSON."""
        return Items(tuple(document["sums"]), tuple(document["counts"]), document["transform"])


@dataclass(frozen=True)
class Findings:
    """Metrics; the items of those that have some; and whatever else is worth keeping, as JSON (texts, per-item results), bounded in size."""

    metrics: dict[str, float]
    items: dict[str, Items] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        return asdict(self)
