"""Log-likelihoods through any runtime: of tokens given logits, and of continuations, many at a time.

Everything is computed from logits in float64, a few positions at a time, so that a vocabulary of 150,000 fits in memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from compression.context import Context
from compression.errors import UnusableModel
from compression.evaluation.runtime import Runtime

_BATCH_LOGITS = 2**25  # logits that a runtime computes at once, 128 MiB in float32
_BATCH_ROWS = 16
_CHUNK_LOGITS = 2**22  # logits held in float64 at once, 32 MiB


@dataclass(frozen=True)
class Likelihood:
    """A continuation's score: the sum of the natural log-probabilities of its tokens, and whether each of them is the most likely one."""

    log_probability: float
    greedy: bool


def continuation_likelihoods(
    runtime: Runtime, pairs: Sequence[tuple[list[int], list[int]]], context: Context, what: str = "rows"
) -> list[Likelihood]:
    """Score continuations after their contexts, many at a time.

    A row that is the beginning of another row (continuations of one token after the same context) is not computed separately. The longest
    rows come first, so that running out of memory comes at once.

    Args:
        runtime: The loaded model.
        pairs: (context, continuation), each of one token or more; a pair that is too long loses the beginning of its context.
        context: Hears of progress.
        what: Name of the rows in the progress.

    Raises:
        Incompatible: As the runtime does.
        UnusableModel: Logits are not finite.
    """
    reads = [(tokens + continuation)[-(runtime.max_length + 1) :][:-1] for tokens, continuation in pairs]
    rows: list[tuple[list[int], list[int]]] = []  # tokens, and the numbers of the pairs that are read from them
    # sorted downward, a row stands right behind those that it begins
    for number in sorted(range(len(pairs)), key=lambda number: reads[number], reverse=True):
        if not rows or rows[-1][0][: len(reads[number])] != reads[number]:
            rows.append((reads[number], []))
        rows[-1][1].append(number)
    rows.sort(key=lambda row: -len(row[0]))  # rows of like length share a batch, with little padding
    found: dict[int, Likelihood] = {}
    done, size = 0, 1  # the first row shows the size of the vocabulary: the embedding's, which may be padded
    while done < len(rows):
        batch = rows[done : done + size]
        width = len(batch[0][0])
        logits = finite_logits(runtime, np.array([[*row, *[0] * (width - len(row))] for row, _ in batch], dtype=np.int64))
        for row_logits, (_, numbers) in zip(logits, batch, strict=True):
            for number in numbers:
                tokens = np.array(pairs[number][1])
                own = row_logits[len(reads[number]) - len(tokens) : len(reads[number])]
                found[number] = Likelihood(float(log_likelihoods(own, tokens).sum()), bool((own.argmax(-1) == tokens).all()))
        done += len(batch)
        if done < len(rows):
            size = batch_rows(len(rows[done][0]), logits.shape[-1])
        context.progress(done, len(rows), what)
    return [found[number] for number in range(len(pairs))]


def log_likelihoods(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return the natural log-probability of `tokens` [...], given the logits [..., vocabulary] that predict them: float64, flattened."""
    targets = torch.from_numpy(np.ascontiguousarray(tokens)).reshape(-1)
    values, done = [], 0
    for chunk in chunks(logits):
        wanted = targets[done : done + len(chunk), None]
        values.append((chunk.gather(-1, wanted)[:, 0] - chunk.logsumexp(-1)).numpy())
        done += len(chunk)
    return np.concatenate(values)


def finite_logits(runtime: Runtime, rows: np.ndarray) -> np.ndarray:
    """Return the logits of rows of tokens. Raises UnusableModel where they are not finite."""
    logits = runtime.logits(rows)
    if not np.isfinite(logits).all():
        raise UnusableModel(f"the model gives logits that are not finite in {runtime.name}: it is damaged, or its type overflows")
    return logits


def batch_rows(length: int, vocabulary: int) -> int:
    """Return how many rows of `length` tokens a runtime gets at once."""
    return max(1, min(_BATCH_ROWS, _BATCH_LOGITS // (length * vocabulary)))


def chunks(logits: np.ndarray) -> Iterator[torch.Tensor]:
    """Yield logits [..., vocabulary] as float64 [positions, vocabulary], a few positions at a time."""
    flat = logits.reshape(-1, logits.shape[-1])
    size = max(1, _CHUNK_LOGITS // flat.shape[1])
    for start in range(0, len(flat), size):
        yield torch.from_numpy(flat[start : start + size]).double()
