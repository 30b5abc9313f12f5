"""Whether generated text is sane, without a reference: loops, silence, broken characters. Imports no torch."""

from collections.abc import Sequence
from statistics import fmean

from compression.evaluation.findings import Items
from compression.evaluation.text import INCOMPLETE
from compression.evaluation.writing import Written

N_GRAM = 4


def repetition(tokens: Sequence[int], n: int = N_GRAM) -> float:
    """Share of the n-grams of tokens that were there before: 1 - distinct / all, and 0 for fewer than n tokens.

    seq-rep-n of Welleck et al., "Neural Text Generation with Unlikelihood Training" (arXiv:1908.04319).
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def empty(written: Written) -> bool:
    """Nothing that a person could see."""
    return not written.text.strip()


def invalid_utf8(written: Written) -> bool:
    """Bytes that are no characters. One character at the very end may be unfinished where the text was cut off: up to three bytes of it."""
    text = written.text
    unfinished = 0 if written.ended else min(3, len(text) - len(text.rstrip(INCOMPLETE)))
    return INCOMPLETE in text[: len(text) - unfinished]


def sanity(texts: Sequence[Written]) -> dict[str, Items]:
    """repetition_rate (mean over texts), empty_rate and invalid_utf8_rate (share of texts), text by text."""
    columns = {
        "repetition_rate": [repetition(t.tokens) for t in texts],
        "empty_rate": [float(empty(t)) for t in texts],
        "invalid_utf8_rate": [float(invalid_utf8(t)) for t in texts],
    }
    return {name: Items(tuple(values), (1.0,) * len(values)) for name, values in columns.items()}


def means(items: dict[str, Items]) -> dict[str, float]:
    """The mean of each metric over its items."""
    return {name: fmean(column.sums) for name, column in items.items()}
