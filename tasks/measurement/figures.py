"""Figures as tables and charts show them: their headings and formats, which way is better, and how far noise reaches. Imports no torch."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from compression.evaluation.contention import CROWDED

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Figure:
    """A metric and how it is shown.

    better  1 where higher is better, -1 where lower is, 0 where neither is
    scale   what a value is divided by
    plain   a text that says nothing: where every value reads so, there is nothing to show
    """

    metric: str
    heading: str
    form: str
    better: int = 0
    scale: float = 1.0
    plain: str = ""

    def value(self, value: float) -> str:
        return self.form.format(value / self.scale)

    def text(self, metrics: Metrics) -> str:
        """The value as text; empty where none was measured."""
        return self.value(metrics[self.metric]) if self.metric in metrics else ""


FIGURES = (
    Figure("accuracy", "accuracy", "{:.3f}", 1),
    Figure("accuracy_stderr", "±", "{:.3f}"),
    Figure("perplexity", "perplexity", "{:.3f}", -1),
    Figure("kl_to_base", "KL to base", "{:.2g}", -1),
    Figure("top1_agreement", "top-1", "{:.3f}", 1),
    Figure("exact_match", "exact", "{:.3f}", 1),
    Figure("f1", "F1", "{:.3f}", 1),
    Figure("rouge_l", "ROUGE-L", "{:.3f}", 1),
    Figure("refusal_rate", "refused", "{:.2f}", 1),
    Figure("over_refusal_rate", "over-refused", "{:.2f}", -1),
    Figure("size_mb", "size MB", "{:.2f}", -1),
    Figure("parameters", "params M", "{:.2f}", scale=1e6),
    Figure("documents", "documents", "{:.0f}"),
    Figure("tokens", "tokens", "{:.0f}"),
    Figure("sparsity", "sparsity", "{:.2f}", plain="0.00"),
    Figure("tokens_per_second", "decode t/s", "{:.0f}", 1),
    Figure("prefill_tokens_per_second", "prefill t/s", "{:.0f}", 1),
    Figure("peak_memory_mb", "memory MB", "{:.0f}", -1),
    Figure("token_seconds_p95", "p95 ms", "{:.1f}", -1, scale=1e-3),
    Figure("energy_joules", "energy J", "{:.2f}", -1),
    Figure("energy_joules_per_token", "J/token", "{:.2g}", -1),
    Figure("energy_joules_per_token_estimated", "J/token (estimate)", "{:.2g}", -1),
)
SANITY = (  # of generated text: said below the samples, no columns of every table
    Figure("repetition_rate", "repeated 4-grams", "{:.2f}", -1),
    Figure("empty_rate", "empty", "{:.2f}", -1),
    Figure("invalid_utf8_rate", "invalid UTF-8", "{:.2f}", -1),
)
BETTER = {figure.metric: figure.better for figure in FIGURES if figure.better}
_HARNESS = "harness."
_LOWER = re.compile(r"perplexity|bits_per_byte|brier|(^|_)(ter|wer|cer)$")  # metrics of the harness of which less is better,
_HIGHER = re.compile(
    r"(^|_)(acc|exact_match|em$|f1|mcc|matthews|bleu|chrf|rouge|pass@|precision|recall|score)"
)  # more; of others nobody knows
_TIMED = {  # by the share of waiting (compression/evaluation/contention.py) that was found while they were taken
    "cpu_wait_share": ("tokens_per_second", "prefill_tokens_per_second", "first_token_seconds"),
    "latency_cpu_wait_share": ("first_token_seconds_p50", "first_token_seconds_p95", "token_seconds_p50", "token_seconds_p95"),
}
BESIDE = ("count", "_stderr", "_low", "_high", "_delta", "_ratio")  # how metrics end that stand beside another


def measured(metrics: Iterable[Metrics]) -> list[Figure]:
    """The figures that at least one of these has something to say of; those of the harness's tasks come last."""
    each = list(metrics)
    names = {name: None for one in each for name in one}
    tasks = [_of_a_task(name) for name in names if name.startswith(_HARNESS) and not name.endswith(BESIDE)]
    return [figure for figure in FIGURES if any(figure.text(one) not in ("", figure.plain) for one in each)] + tasks


def _of_a_task(name: str) -> Figure:
    """That of harness.{task}.{metric} or harness.{task}.{metric}.{filter}."""
    words = name.removeprefix(_HARNESS).split(".")
    at = len(words) - 2 if len(words) > 2 and _direction(words[-2]) else len(words) - 1
    return Figure(name, " ".join([".".join(words[:at]), *words[at:]]), "{:.3f}", _direction(words[at]))


def _direction(metric: str) -> int:
    return -1 if _LOWER.search(metric) else 1 if _HIGHER.search(metric) else 0


def noise(metrics: Metrics, metric: str) -> tuple[float, float] | None:
    """From where to where noise reaches: the interval that was measured (`<metric>_low`, `_high`), or 1.96 standard errors; None: not known."""
    low, high = metrics.get(f"{metric}_low"), metrics.get(f"{metric}_high")
    if low is not None and high is not None:
        return low, high
    if metric in metrics and f"{metric}_stderr" in metrics:
        reach = 1.96 * metrics[f"{metric}_stderr"]
        return metrics[metric] - reach, metrics[metric] + reach
    return None


def contended(metrics: Metrics, metric: str) -> bool:
    """Whether other programs had the cores while this was timed, so that the model may be faster than the figure says."""
    return any(metric in timed and metrics.get(share, 0.0) > CROWDED for share, timed in _TIMED.items())


def most_contended(metrics: Metrics) -> float:
    """The largest share of waiting of what was timed, where it makes figures doubtful; else 0."""
    return max((metrics[share] for share in _TIMED if metrics.get(share, 0.0) > CROWDED), default=0.0)


def noise_text(metrics: Metrics, figure: Figure) -> str:
    """`0.81–0.94`; empty where it is not known."""
    found = noise(metrics, figure.metric)
    return f"{figure.value(found[0])}–{figure.value(found[1])}" if found else ""


def within_noise(first: Metrics, second: Metrics, metric: str) -> bool | None:
    """Whether two measurements of a metric differ by no more than both reach together, as independent errors add; None: nothing is known.

    Where both were measured on the same items their errors are not independent but alike, and the rule is on the safe side.
    """
    mine, theirs = noise(first, metric), noise(second, metric)
    if mine is None or theirs is None:
        return None
    lower, upper = ((first, mine), (second, theirs)) if first[metric] <= second[metric] else ((second, theirs), (first, mine))
    gap = upper[0][metric] - lower[0][metric]
    return gap <= math.hypot(lower[1][1] - lower[0][metric], upper[0][metric] - upper[1][0])
