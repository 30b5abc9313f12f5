"""Quality of a model through any runtime: perplexity, divergence from other models, multiple-choice accuracy.

Everything is computed from logits in float64, a few positions at a time, so that a divergence of 1e-7 is still a number and a
vocabulary of 150,000 fits in memory. Scored are the positions that predict a token of the same window: all but its last.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from compression.context import Context
from compression.data.rows import encode_choices
from compression.errors import Incompatible, UnusableData, UnusableModel
from compression.evaluation.findings import Findings, Items, Transform
from compression.evaluation.runtime import Runtime
from compression.reference.world import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_BATCH_LOGITS = 2**25  # logits asked of a runtime at once, 128 MiB in float32
_BATCH_ROWS = 16
_CHUNK_LOGITS = 2**22  # logits held in float64 at once, 32 MiB


@dataclass(frozen=True)
class Divergence:
    """How far a candidate's next-token distributions are from a reference's; every field has one value per position.

    kl                KL(reference || candidate) = sum p_ref (log p_ref - log p_candidate), in nats
    agrees            both put the same token first
    logit_difference  the largest absolute difference of a logit
    """

    kl: np.ndarray
    agrees: np.ndarray
    logit_difference: np.ndarray

    @staticmethod
    def join(parts: Sequence["Divergence"]) -> "Divergence":
        return Divergence(*(np.concatenate([getattr(p, f) for p in parts]) for f in ("kl", "agrees", "logit_difference")))

    def items(self, name: str, windows: int) -> dict[str, Items]:
        """Those of kl_to_{name} and top1_agreement_to_{name}, by window; the positions are those of `windows` windows of equal length."""
        each = len(self.kl) // windows
        totals = {f"kl_to_{name}": self.kl, f"top1_agreement_to_{name}": self.agrees}
        return {metric: _items(values.reshape(windows, each)) for metric, values in totals.items()}

    def figures(self, name: str) -> dict[str, float]:
        """kl_to_{name} (mean), kl_p99_to_{name} (99th percentile), top1_agreement_to_{name}, max_logit_difference_to_{name}."""
        return {
            f"kl_to_{name}": float(self.kl.mean()),
            f"kl_p99_to_{name}": float(np.quantile(self.kl, 0.99)),
            f"top1_agreement_to_{name}": float(self.agrees.mean()),
            f"max_logit_difference_to_{name}": float(self.logit_difference.max()),
        }


def divergence(reference: np.ndarray, candidate: np.ndarray) -> Divergence:
    """Compare float32 logits [..., vocabulary] of two models at the same positions.

    Raises Incompatible when the vocabularies differ.
    """
    if reference.shape != candidate.shape:
        raise Incompatible(
            f"the model's logits {list(candidate.shape)} cannot be compared with the reference's {list(reference.shape)}; "
            "a reference needs the same vocabulary"
        )
    parts = []
    for p, q in zip(_chunks(reference), _chunks(candidate), strict=True):
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        parts.append(
            Divergence(
                kl=(log_p.exp() * (log_p - log_q)).sum(-1).numpy(),
                agrees=(p.argmax(-1) == q.argmax(-1)).numpy(),
                logit_difference=(p - q).abs().amax(-1).numpy(),
            )
        )
    return Divergence.join(parts)


def log_likelihoods(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Natural log-probability of `tokens` [...], given the logits [..., vocabulary] that predict them: float64, flattened."""
    targets = torch.from_numpy(np.ascontiguousarray(tokens)).reshape(-1)
    values, done = [], 0
    for chunk in _chunks(logits):
        wanted = targets[done : done + len(chunk), None]
        values.append((chunk.gather(-1, wanted)[:, 0] - chunk.logsumexp(-1)).numpy())
        done += len(chunk)
    return np.concatenate(values)


def perplexity(runtime: Runtime, windows: torch.Tensor, context: Context) -> float:
    """Exponential of the mean negative log-likelihood of every token of the windows but the first of each.

    windows  int64 [windows, length]
    """
    return math.exp(-np.concatenate([_window_scores(logits, rows) for rows, (logits,) in _windows([runtime], windows, context)]).mean())


@dataclass(frozen=True)
class MultipleChoice:
    """`correct` has one truth value per question, in their order."""

    correct: tuple[bool, ...]

    def items(self) -> Items:
        return Items(tuple(map(float, self.correct)), (1.0,) * len(self.correct))

    def figures(self) -> dict[str, float]:
        """accuracy, accuracy_count and, from two questions on, accuracy_stderr: sample standard deviation / sqrt(count)."""
        count, accuracy = len(self.correct), sum(self.correct) / len(self.correct)
        figures = {"accuracy": accuracy, "accuracy_count": float(count)}
        if count > 1:
            figures["accuracy_stderr"] = math.sqrt(accuracy * (1 - accuracy) / (count - 1))
        return figures


@dataclass(frozen=True)
class _Answer:
    """One choice to be scored: its tokens are predicted at `start` and after in the row it reads."""

    question: int
    choice: int
    tokens: list[int]
    start: int


def multiple_choice(
    runtime: Runtime, tokenizer: "PreTrainedTokenizerBase", questions: Sequence[Question], context: Context
) -> MultipleChoice:
    """Take for each question the choice with the highest log-likelihood per UTF-8 byte of its text (the blank before it not counted).

    This is `acc_bytes` of lm-evaluation-harness, and its `acc_norm` (per character) wherever choices are ASCII. Prompts and
    truncation are those of compression/data/rows.py.

    Raises UnusableData without questions, or for a choice that does not fit into the runtime's context.
    """
    if not questions:
        raise UnusableData("there are no questions to measure accuracy with; give data.questions", key="questions")
    jobs = [job for number, question in enumerate(questions) for job in _rows_of(number, question, tokenizer, runtime.max_length)]
    jobs.sort(key=lambda job: len(job[0]))  # rows of like length share a batch, with little padding
    scores = [np.empty(len(q.choices)) for q in questions]
    done = 0
    while done < len(jobs):
        batch = jobs[done : done + _batch_rows(max(len(row) for row, _ in jobs[done : done + _BATCH_ROWS]), len(tokenizer))]
        longest = max(len(row) for row, _ in batch)
        logits = _logits(runtime, np.array([row + [0] * (longest - len(row)) for row, _ in batch], dtype=np.int64))
        for row_logits, (_, answers) in zip(logits, batch, strict=True):
            for a in answers:
                scores[a.question][a.choice] = log_likelihoods(row_logits[a.start : a.start + len(a.tokens)], np.array(a.tokens)).sum()
        done += len(batch)
        context.progress(done, len(jobs), "questions")
    return MultipleChoice(tuple(_best(s, q) == q.answer for s, q in zip(scores, questions, strict=True)))


def evaluate_quality(
    runtime: Runtime,
    tokenizer: "PreTrainedTokenizerBase",
    windows: torch.Tensor,
    questions: Sequence[Question],
    *,
    references: Mapping[str, Runtime],
    context: Context,
) -> Findings:
    """Every quality figure of a model: one pass over the windows, one over the questions.

    windows     int64 [windows, length]
    questions   may be empty: then no accuracy is told
    references  models to be compared with, by name; one that has two names runs once

    Returns perplexity and perplexity_count (tokens predicted); accuracy, accuracy_stderr and accuracy_count; for each reference
    r kl_to_{r}, kl_p99_to_{r}, top1_agreement_to_{r} and max_logit_difference_to_{r}, and for "base" top1_agreement as well. Items of perplexity, KL
    and agreement are windows, of accuracy questions.
    Raises Incompatible: windows longer than a context, another vocabulary. UnusableModel: logits that are not finite.
    """
    distinct = list({id(r): r for r in references.values()}.values())
    scores: list[np.ndarray] = []
    parts: dict[str, list[Divergence]] = {name: [] for name in references}
    for rows, outputs in _windows([runtime, *distinct], windows, context):
        scores.append(_window_scores(outputs[0], rows))
        compared = {id(r): divergence(o[:, :-1], outputs[0][:, :-1]) for r, o in zip(distinct, outputs[1:], strict=True)}
        for name, reference in references.items():
            parts[name].append(compared[id(reference)])
    scored = np.concatenate(scores)
    figures = {"perplexity": math.exp(-scored.mean()), "perplexity_count": float(scored.size)}
    items = {"perplexity": _items(-scored.reshape(len(windows), -1), "exp")}
    for name, found in parts.items():
        whole = Divergence.join(found)
        figures |= whole.figures(name)
        items |= whole.items(name, len(windows))
    if "base" in references:
        figures["top1_agreement"], items["top1_agreement"] = figures["top1_agreement_to_base"], items["top1_agreement_to_base"]
    if questions:
        answered = multiple_choice(runtime, tokenizer, questions, context)
        figures |= answered.figures()
        items["accuracy"] = answered.items()
    return Findings(figures, items)


def _items(values: np.ndarray, transform: Transform = "mean") -> Items:
    """Items of a figure that has a value for each position: [windows, positions]."""
    return Items(tuple(values.sum(1, dtype=np.float64).tolist()), (float(values.shape[1]),) * len(values), transform)


def _windows(runtimes: Sequence[Runtime], windows: torch.Tensor, context: Context) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Batches of windows with the logits of each runtime."""
    rows = windows.numpy()
    for runtime in runtimes:
        if rows.shape[1] > runtime.max_length:
            raise Incompatible(
                f"windows of {rows.shape[1]} tokens do not fit into the model's {runtime.max_length}; lower data.length", key="length"
            )
    done, size = 0, 1  # the first window tells the size of the vocabulary
    while done < len(rows):
        batch = rows[done : done + size]
        outputs = [_logits(runtime, batch) for runtime in runtimes]
        size = _batch_rows(rows.shape[1], outputs[0].shape[-1])
        yield batch, outputs
        done += len(batch)
        context.progress(done, len(rows), "windows")


def _window_scores(logits: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return log_likelihoods(logits[:, :-1], rows[:, 1:])


def _logits(runtime: Runtime, rows: np.ndarray) -> np.ndarray:
    logits = runtime.logits(rows)
    if not np.isfinite(logits).all():
        raise UnusableModel(f"the model gives logits that are not finite in {runtime.name}: it is damaged, or its type overflows")
    return logits


def _batch_rows(length: int, vocabulary: int) -> int:
    return max(1, min(_BATCH_ROWS, _BATCH_LOGITS // (length * vocabulary)))


def _chunks(logits: np.ndarray) -> Iterator[torch.Tensor]:
    """Logits [..., vocabulary] as float64 [positions, vocabulary], a few positions at a time."""
    flat = logits.reshape(-1, logits.shape[-1])
    size = max(1, _CHUNK_LOGITS // flat.shape[1])
    for start in range(0, len(flat), size):
        yield torch.from_numpy(flat[start : start + size]).double()


def _rows_of(
    number: int, question: Question, tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> list[tuple[list[int], list[_Answer]]]:
    """The rows a question needs and the answers read from each.

    A choice reads the prompt and its own tokens but the last. Where that is the beginning of another choice's row it needs none of
    its own: five choices of one token cost one row.
    """
    rows: list[tuple[list[int], list[_Answer]]] = []
    encoded = [(choice, *_fit(prompt, answer, max_length)) for choice, (prompt, answer) in enumerate(encode_choices(tokenizer, question))]
    for choice, prompt, answer in sorted(encoded, key=lambda e: -len(e[1]) - len(e[2])):
        row = (prompt + answer)[:-1]
        host = next((answers for other, answers in rows if other[: len(row)] == row), None)
        if host is None:
            rows.append((row, host := []))
        host.append(_Answer(number, choice, answer, len(prompt) - 1))
    return rows


def _fit(prompt: list[int], answer: list[int], max_length: int) -> tuple[list[int], list[int]]:
    """Cut the prompt's beginning so that it and all of the answer but its last token, which is never read, fit."""
    room = max_length + 1 - len(answer)
    if room < 1:
        raise UnusableData(f"a choice of {len(answer)} tokens does not fit into the model's {max_length}", key="questions")
    return prompt[-room:], answer


def _best(scores: np.ndarray, question: Question) -> int:
    return int(np.argmax(scores / [len(c.encode()) for c in question.choices]))
