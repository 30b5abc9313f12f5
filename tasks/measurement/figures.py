"""Figures as tables and charts show them: headings, formats, which direction is better, and how far noise reaches. Imports no torch."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from compression.evaluation.contention import CROWDED

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Figure:
    """A metric and how it is shown.

    Attributes:
        metric: Its name.
        heading: Of its column.
        form: How `str.format` writes the value.
        better: 1 where higher is better, -1 where lower is, 0 where neither is.
        scale: Divides the value.
        plain: A text without information: a column that holds nothing else is left out.
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
        """Format the value; empty where it was not measured."""
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
SANITY = (  # of generated text: shown below the samples, not as columns of every table
    Figure("repetition_rate", "repeated 4-grams", "{:.2f}", -1),
    Figure("empty_rate", "empty", "{:.2f}", -1),
    Figure("invalid_utf8_rate", "invalid UTF-8", "{:.2f}", -1),
)
BETTER = {figure.metric: figure.better for figure in FIGURES if figure.better}
_HARNESS = "harness."
# Metrics of the harness of which less or more is better. Of others the direction is not known.
_LOWER = re.compile(r"perplexity|bits_per_byte|brier|(^|_)(ter|wer|cer)$")
_HIGHER = re.compile(r"(^|_)(acc|exact_match|em$|f1|mcc|matthews|bleu|chrf|rouge|pass@|precision|recall|score)")
_TIMED = {  # timings by the metric that says how long their threads waited for cores (compression/evaluation/contention.py)
    "cpu_wait_share": ("tokens_per_second", "prefill_tokens_per_second", "first_token_seconds"),
    "latency_cpu_wait_share": ("first_token_seconds_p50", "first_token_seconds_p95", "token_seconds_p50", "token_seconds_p95"),
}
DERIVED_SUFFIXES = ("count", "_stderr", "_low", "_high", "_delta", "_ratio")  # of metrics that belong to another metric


def measured(metrics: Iterable[Metrics]) -> list[Figure]:
    """Select the figures of which at least one set of metrics has something to show; those of the harness's tasks come last."""
    rows = list(metrics)
    names = {name: None for row in rows for name in row}
    tasks = [_task_figure(name) for name in names if name.startswith(_HARNESS) and not name.endswith(DERIVED_SUFFIXES)]
    return [figure for figure in FIGURES if any(figure.text(row) not in ("", figure.plain) for row in rows)] + tasks


def _task_figure(name: str) -> Figure:
    """The figure of `harness.{task}.{metric}` or `harness.{task}.{metric}.{filter}`; the task's name may have dots."""
    parts = name.removeprefix(_HARNESS).split(".")
    at = len(parts) - 2 if len(parts) > 2 and _direction(parts[-2]) else len(parts) - 1
    return Figure(name, " ".join([".".join(parts[:at]), *parts[at:]]), "{:.3f}", _direction(parts[at]))


def _direction(metric: str) -> int:
    return -1 if _LOWER.search(metric) else 1 if _HIGHER.search(metric) else 0


def noise(metrics: Metrics, metric: str) -> tuple[float, float] | None:
    """Return the ends of a metric's 95 % interval: the measured one (`<metric>_low`, `_high`), or 1.96 standard errors; None where it is not known."""
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
    """Return the largest share of time that timings waited for cores, where it makes figures doubtful; else 0."""
    return max((metrics[share] for share in _TIMED if metrics.get(share, 0.0) > CROWDED), default=0.0)


def noise_text(metrics: Metrics, figure: Figure) -> str:
    """Format the interval as `0.81–0.94`; empty where it is not known."""
    interval = noise(metrics, figure.metric)
    return f"{figure.value(interval[0])}–{figure.value(interval[1])}" if interval else ""


def within_noise(one: Metrics, other: Metrics, metric: str) -> bool | None:
    """Whether two measurements of a metric differ by no more than their joint noise, as independent errors add; None where noise is not known.

    Errors of measurements on the same items are not independent but alike; then the rule is on the safe side.
    """
    intervals = [(metrics[metric], *interval) for metrics in (one, other) if (interval := noise(metrics, metric)) is not None]
    if len(intervals) < 2:
        return None
    (lower, _, lower_end), (upper, upper_begin, _) = sorted(intervals)
    return upper - lower <= math.hypot(lower_end - lower, upper - upper_begin)
