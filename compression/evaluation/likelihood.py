"""Log-likelihoods of continuations through any runtime, many at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compression.context import Context
from compression.errors import UnusableModel
from compression.evaluation.runtime import Runtime
from compression.evaluation.scorers import log_likelihoods

_BATCH_ROWS = 16
_BATCH_LOGITS = 2**25  # logits asked of a runtime at once, 128 MiB in float32


@dataclass(frozen=True)
class Likelihood:
    """Of a continuation: the sum of the natural log-probabilities of its tokens, and whether each of them is the most likely one."""

    log_probability: float
    greedy: bool


def continuation_likelihoods(
    runtime: Runtime, pairs: Sequence[tuple[list[int], list[int]]], vocabulary: int, context: Context
) -> list[Likelihood]:
    """Score each (prompt, continuation), both of one token or more; what is too long loses the beginning of its prompt.

    vocabulary  size, for how much fits into a batch
    Pairs that read the same tokens (continuations of one token after the same prompt) share a row. Raises Incompatible as the runtime does, and
    UnusableModel for logits that are not finite.
    """
    readers: dict[tuple[int, ...], list[int]] = {}
    for number, (prompt, continuation) in enumerate(pairs):
        readers.setdefault(tuple((prompt + continuation)[-(runtime.max_length + 1) :][:-1]), []).append(number)
    rows = sorted(readers, key=len)  # rows of like length share a batch, with little padding
    found: dict[int, Likelihood] = {}
    done = 0
    while done < len(rows):
        longest = len(rows[min(done + _BATCH_ROWS, len(rows)) - 1])
        batch = rows[done : done + max(1, min(_BATCH_ROWS, _BATCH_LOGITS // (longest * vocabulary)))]
        width = max(map(len, batch))
        logits = runtime.logits(np.array([[*row, *[0] * (width - len(row))] for row in batch], dtype=np.int64))
        if not np.isfinite(logits).all():
            raise UnusableModel(f"the model gives logits that are not finite in {runtime.name}: it is damaged, or its type overflows")
        for row, row_logits in zip(batch, logits, strict=True):
            for number in readers[row]:
                tokens = np.array(pairs[number][1])
                own = row_logits[len(row) - len(tokens) : len(row)]
                found[number] = Likelihood(float(log_likelihoods(own, tokens).sum()), bool((own.argmax(-1) == tokens).all()))
        done += len(batch)
        context.progress(done, len(rows), "rows")
    return [found[number] for number in range(len(pairs))]
