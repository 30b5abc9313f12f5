"""Quality of a model through any runtime: perplexity, divergence from other models, multiple-choice accuracy.

Everything is computed from logits in float64, so that a divergence of 1e-7 is still a number. Scored are the positions that predict a
token of the same window: all but its last.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from compression.context import Context
from compression.data.rows import encode_choices
from compression.errors import Incompatible, UnusableData
from compression.evaluation.findings import Findings, Items, Transform, exponential
from compression.evaluation.likelihood import Likelihood, batch_rows, chunks, continuation_likelihoods, finite_logits, log_likelihoods
from compression.evaluation.runtime import Runtime
from compression.reference.world import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class DistributionDistance:
    """The distance of a candidate's next-token distributions from a reference's; every field has one value per position.

    Attributes:
        kl: KL(reference || candidate) = sum p_ref (log p_ref - log p_candidate), in nats.
        agrees: Whether both put the same token first.
        logit_difference: The largest absolute difference of a logit.
    """

    kl: np.ndarray
    agrees: np.ndarray
    logit_difference: np.ndarray

    @staticmethod
    def join(parts: Sequence["DistributionDistance"]) -> "DistributionDistance":
        return DistributionDistance(*(np.concatenate([getattr(p, f) for p in parts]) for f in ("kl", "agrees", "logit_difference")))

    def items(self, name: str, windows: int) -> dict[str, Items]:
        """Return the items of kl_to_{name} and top1_agreement_to_{name}, by window; all `windows` windows have equal length."""
        each = len(self.kl) // windows
        totals = {f"kl_to_{name}": self.kl, f"top1_agreement_to_{name}": self.agrees}
        return {metric: _items(values.reshape(windows, each)) for metric, values in totals.items()}

    def figures(self, name: str) -> dict[str, float]:
        """Return kl_to_{name} (mean), kl_p99_to_{name} (99th percentile), top1_agreement_to_{name}, max_logit_difference_to_{name}."""
        return {
            f"kl_to_{name}": float(self.kl.mean()),
            f"kl_p99_to_{name}": float(np.quantile(self.kl, 0.99)),
            f"top1_agreement_to_{name}": float(self.agrees.mean()),
            f"max_logit_difference_to_{name}": float(self.logit_difference.max()),
        }


def divergence(reference: np.ndarray, candidate: np.ndarray) -> DistributionDistance:
    """Compare float32 logits [..., vocabulary] of two models at the same positions.

    Raises Incompatible when the vocabularies differ.
    """
    if reference.shape != candidate.shape:
        raise Incompatible(
            f"the model's logits {list(candidate.shape)} cannot be compared with the reference's {list(reference.shape)}; "
            "a reference needs the same vocabulary"
        )
    parts = []
    for p, q in zip(chunks(reference), chunks(candidate), strict=True):
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        parts.append(
            DistributionDistance(
                kl=(log_p.exp() * (log_p - log_q)).sum(-1).numpy(),
                agrees=(p.argmax(-1) == q.argmax(-1)).numpy(),
                logit_difference=(p - q).abs().amax(-1).numpy(),
            )
        )
    return DistributionDistance.join(parts)


def perplexity(runtime: Runtime, windows: torch.Tensor, context: Context) -> float:
    """Return the exponential of the mean negative log-likelihood of every token of the windows, int64 [windows, length], but the first of each."""
    return exponential(-np.concatenate([_window_scores(logits, rows) for rows, (logits,) in _windows([runtime], windows, context)]).mean())


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


def multiple_choice(
    runtime: Runtime, tokenizer: "PreTrainedTokenizerBase", questions: Sequence[Question], context: Context, system: str | None = None
) -> MultipleChoice:
    """Take for each question the choice with the highest log-likelihood per UTF-8 byte of its text (the blank before it not counted).

    This is `acc_bytes` of lm-evaluation-harness, and its `acc_norm` (per character) wherever choices are ASCII. Prompts and
    truncation are those of compression/data/rows.py.

    Args:
        runtime: The loaded model.
        tokenizer: Of the model.
        questions: At least one.
        context: Hears of progress.
        system: Message in front of every question, where the tokenizer has a chat template.

    Raises:
        UnusableData: No questions, a choice that does not fit into the runtime's context, or as `encode_choices` does.
    """
    if not questions:
        raise UnusableData("there are no questions to measure accuracy with; give data.questions", key="questions")
    pairs = [pair for question in questions for pair in encode_choices(tokenizer, question, system)]
    if (longest := max(len(choice) for _, choice in pairs)) > runtime.max_length:
        raise UnusableData(f"a choice of {longest} tokens does not fit into the model's {runtime.max_length}", key="questions")
    found = iter(continuation_likelihoods(runtime, pairs, context, "questions"))
    return MultipleChoice(tuple(_best([next(found) for _ in q.choices], q) == q.answer for q in questions))


def evaluate_quality(
    runtime: Runtime,
    tokenizer: "PreTrainedTokenizerBase",
    windows: torch.Tensor,
    questions: Sequence[Question],
    *,
    references: Mapping[str, Runtime],
    context: Context,
    system: str | None = None,
) -> Findings:
    """Measure every quality figure of a model: one pass over the windows, one over the questions.

    Args:
        runtime: The loaded model.
        tokenizer: Of the model.
        windows: int64 [windows, length].
        questions: For the accuracy; without any there is none.
        references: Models to compare with, by name; a model with two names runs once.
        context: Hears of progress.
        system: Message in front of every question, where the tokenizer has a chat template.

    Returns:
        perplexity and perplexity_count (tokens predicted); accuracy, accuracy_stderr and accuracy_count; for each reference
        r kl_to_{r}, kl_p99_to_{r}, top1_agreement_to_{r} and max_logit_difference_to_{r}, and for "base" top1_agreement as well. Items of
        perplexity, KL and agreement are windows, of accuracy questions.

    Raises:
        Incompatible: Windows longer than a context, or another vocabulary.
        UnusableModel: Logits are not finite.
    """
    distinct = list({id(r): r for r in references.values()}.values())
    scores: list[np.ndarray] = []
    parts: dict[str, list[DistributionDistance]] = {name: [] for name in references}
    for rows, outputs in _windows([runtime, *distinct], windows, context):
        scores.append(_window_scores(outputs[0], rows))
        compared = {id(r): divergence(o[:, :-1], outputs[0][:, :-1]) for r, o in zip(distinct, outputs[1:], strict=True)}
        for name, reference in references.items():
            parts[name].append(compared[id(reference)])
    scored = np.concatenate(scores)
    figures = {"perplexity": exponential(-scored.mean()), "perplexity_count": float(scored.size)}
    items = {"perplexity": _items(-scored.reshape(len(windows), -1), "exp")}
    for name, found in parts.items():
        whole = DistributionDistance.join(found)
        figures |= whole.figures(name)
        items |= whole.items(name, len(windows))
    if "base" in references:
        figures["top1_agreement"], items["top1_agreement"] = figures["top1_agreement_to_base"], items["top1_agreement_to_base"]
    if questions:
        answered = multiple_choice(runtime, tokenizer, questions, context, system)
        figures |= answered.figures()
        items["accuracy"] = answered.items()
    return Findings(figures, items)


def _items(values: np.ndarray, transform: Transform = "mean") -> Items:
    """Return the items of a figure that has a value for each position: [windows, positions]."""
    return Items(tuple(values.sum(1, dtype=np.float64).tolist()), (float(values.shape[1]),) * len(values), transform)


def _windows(runtimes: Sequence[Runtime], windows: torch.Tensor, context: Context) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Yield batches of windows with the logits of each runtime."""
    rows = windows.numpy()
    for runtime in runtimes:
        if rows.shape[1] > runtime.max_length:
            raise Incompatible(
                f"windows of {rows.shape[1]} tokens do not fit into the model's {runtime.max_length}; lower data.length", key="length"
            )
    done, size = 0, 1  # the first window shows the size of the vocabulary
    while done < len(rows):
        batch = rows[done : done + size]
        outputs = [finite_logits(runtime, batch) for runtime in runtimes]
        size = batch_rows(rows.shape[1], outputs[0].shape[-1])
        yield batch, outputs
        done += len(batch)
        context.progress(done, len(rows), "windows")


def _window_scores(logits: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return log_likelihoods(logits[:, :-1], rows[:, 1:])


def _best(found: Sequence[Likelihood], question: Question) -> int:
    return int(np.argmax([each.log_probability / len(choice.encode()) for each, choice in zip(found, question.choices, strict=True)]))
