"""Bounds on metrics, and the verdicts computed from records. Loosening a bound never runs a stage again. Imports no torch.

One rule judges every bound. The value has a 95 % interval: that of the metric (its `_low` and `_high`) or, where the limit is relative to another
stage, that of the difference: from items that both stages share (compression/evaluation/bootstrap.py), else from both intervals.

    PASS          the value and its whole interval satisfy the limit
    FAIL          neither the value nor any part of its interval does: the bound is broken beyond noise
    INCONCLUSIVE  in between: the limit lies within the noise. It stops nothing, unless the bound is `strict`: then it fails

A metric without an interval (a size) has no noise and is never INCONCLUSIVE. The exception is a timing taken while other programs had the cores: it
fails no bound. A value that is not a finite number fails every bound, and so does a value that is compared with one.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from compression.evaluation.findings import Items
from compression.settings import Settings
from tasks.measurement.figures import contended, noise

Outcome = Literal["PASS", "FAIL", "INCONCLUSIVE"]
Relation = Literal["at least", "at most"]


def _share(value: object) -> object:
    """Accept "5%" for 0.05."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip()[:-1]) / 100
        except ValueError:
            raise ValueError(f"{value!r} is not a share: write 5% or 0.05") from None
    return value


Increase = Annotated[float, Field(ge=0), BeforeValidator(_share, json_schema_input_type=Annotated[float, Field(ge=0)] | str)]
Decrease = Annotated[float, Field(ge=0, le=1), BeforeValidator(_share, json_schema_input_type=Annotated[float, Field(ge=0, le=1)] | str)]


class Bound(Settings):
    """Bounds of one metric: absolute, or relative to the same metric of another stage. A value that breaks one beyond noise fails its stage."""

    min: float | None = Field(default=None, description="Smallest value that passes.")
    max: float | None = Field(default=None, description="Largest value that passes.")
    max_increase: Increase | None = Field(default=None, description="Largest relative increase over `relative_to`, as 0.05 or 5%.")
    max_decrease: Decrease | None = Field(default=None, description="Largest relative decrease from `relative_to`, as 0.05 or 5%.")
    max_rise: float | None = Field(default=None, ge=0, description="Largest increase over `relative_to`, in the metric's own unit.")
    max_drop: float | None = Field(
        default=None, ge=0, description="Largest decrease from `relative_to`, in the metric's own unit: 0.02 of accuracy is two points."
    )
    relative_to: str = Field(default="base", description="The stage to compare with: a name, `base` or `parent`.")
    strict: bool = Field(default=False, description="Whether a value that the noise leaves open (INCONCLUSIVE) fails too.")
    if_measured: bool = Field(default=False, description="Whether it is skipped, instead of failing, where the metric was not measured.")

    @model_validator(mode="after")
    def _bounds_something(self) -> "Bound":
        if not any(True for _ in self.limits()):
            raise ValueError("a bound needs min, max, max_increase, max_decrease, max_rise or max_drop")
        return self

    @property
    def relative(self) -> bool:
        return any(limit.relative for limit in self.limits())

    def limits(self) -> "Iterator[Limit]":
        """Yield each limit that it sets."""
        absolute: list[tuple[Relation, float | None]] = [("at least", self.min), ("at most", self.max)]
        for relation, value in absolute:
            if value is not None:
                yield Limit(relation, amount=value)
        relative: list[tuple[Relation, float | None, bool]] = [
            ("at most", self.max_increase, True), ("at least", self.max_decrease, True),
            ("at most", self.max_rise, False), ("at least", self.max_drop, False),
        ]  # fmt: skip
        for relation, amount, share in relative:
            if amount is not None:
                yield Limit(relation, amount, relative=True, share=share)

    def requirement(self) -> str:
        """Return what it requires as text: `at most 5% above base`."""
        limits = " and ".join(limit.requirement(self.relative_to) for limit in self.limits())
        notes = ", ".join(note for note, applies in (("strict", self.strict), ("if measured", self.if_measured)) if applies)
        return f"{limits} ({notes})" if notes else limits


@dataclass(frozen=True)
class Limit:
    """One limit of a bound: `amount` itself, or an amount above or below a reference (a share of it, or in its unit)."""

    relation: Relation
    amount: float
    relative: bool = False
    share: bool = False

    def threshold(self, reference: Any) -> Any:
        """Compute the number that bounds the value.

        Args:
            reference: The reference's value, or an array of values, which gives an array; ignored by an absolute limit.
        """
        if not self.relative:
            return self.amount
        return reference + (1 if self.relation == "at most" else -1) * self.amount * (abs(reference) if self.share else 1)

    def requirement(self, relative_to: str) -> str:
        """Return what it requires as text."""
        if not self.relative:
            return f"{self.relation} {self.amount:g}"
        amount = _percent(self.amount) if self.share else f"{self.amount:g}"
        return f"at most {amount} {'above' if self.relation == 'at most' else 'below'} {relative_to}"


@dataclass(frozen=True)
class Figures:
    """The measurements of a stage: its metrics, with the intervals among them, and the items that some are computed from."""

    metrics: Mapping[str, float]
    items: Mapping[str, Items] = field(default_factory=dict)

    def interval(self, metric: str) -> tuple[float, float]:
        """Return the interval of a metric; where its noise is not known, the value twice."""
        return noise(self.metrics, metric) or (self.metrics[metric], self.metrics[metric])


@dataclass(frozen=True)
class Verdict:
    """The judgement on one limit of one metric.

    Attributes:
        metric: Its name.
        outcome: PASS, FAIL or INCONCLUSIVE.
        message: The judgement as a sentence for people.
        relation: Whether the limit is a smallest or a largest value; None, as all that follows, where the metric was not measured.
        value: The metric's value.
        limit: The limit as a number, also where it is relative.
        low: Lower end of the value's 95 % interval, which includes the reference's noise; None without noise.
        high: Its upper end.
    """

    metric: str
    outcome: Outcome
    message: str
    relation: Relation | None = None
    value: float | None = None
    limit: float | None = None
    low: float | None = None
    high: float | None = None


def judge(bounds: Mapping[str, Bound], figures: Figures, references: Mapping[str, Figures]) -> list[Verdict]:
    """Judge every bound on a stage.

    Args:
        bounds: Bounds by metric.
        figures: The stage's own.
        references: Those of the stages that `relative_to` names.

    Returns:
        A verdict for each limit. A metric that was not measured fails, or has no verdict where the bound says `if_measured`.
    """
    return [verdict for metric, bound in bounds.items() for verdict in _judge_bound(metric, bound, figures, references)]


def _judge_bound(metric: str, bound: Bound, figures: Figures, references: Mapping[str, Figures]) -> Iterator[Verdict]:
    if metric not in figures.metrics:
        if not bound.if_measured:
            yield Verdict(metric, "FAIL", f"{metric} was not measured; measured: {', '.join(sorted(figures.metrics))}")
        return
    reference = references.get(bound.relative_to, Figures({}))
    for limit in bound.limits():
        if limit.relative and metric not in reference.metrics:
            if not bound.if_measured:
                yield Verdict(metric, "FAIL", f"{metric} of {bound.relative_to} was not measured, so nothing can be relative to it")
        else:
            yield _judge_limit(metric, limit, bound, figures, reference)


def _judge_limit(metric: str, limit: Limit, bound: Bound, figures: Figures, reference: Figures) -> Verdict:
    value = figures.metrics[metric]
    threshold = limit.threshold(reference.metrics.get(metric))
    if not (math.isfinite(value) and math.isfinite(threshold)):
        culprit = metric if not math.isfinite(value) else f"{metric} of {bound.relative_to}"
        return Verdict(metric, "FAIL", f"{culprit} is not a finite number, so it satisfies no bound", limit.relation, value, threshold)
    margins = _paired_margins(metric, limit, figures, reference) if limit.relative else None
    below, above = margins or _margins(metric, limit, threshold, figures, reference)
    low, high = value + min(below, 0.0), value + max(above, 0.0)
    if limit.relation == "at most":
        satisfied, all_satisfied, any_satisfied = value <= threshold, high <= threshold, low <= threshold
    else:
        satisfied, all_satisfied, any_satisfied = value >= threshold, low >= threshold, high >= threshold
    outcome: Outcome = "PASS" if satisfied and all_satisfied else "INCONCLUSIVE" if any_satisfied else "FAIL"
    message = _message(metric, limit, bound, value, threshold, reference.metrics.get(metric), outcome, (high - low) / 2)
    if outcome == "FAIL" and (contended(figures.metrics, metric) or (limit.relative and contended(reference.metrics, metric))):
        outcome, message = "INCONCLUSIVE", f"{message}, but other programs had the cores while it was timed (`edgepress run --remeasure`)"
    final: Outcome = "FAIL" if outcome == "INCONCLUSIVE" and bound.strict else outcome
    interval = (low, high) if high > low else (None, None)
    return Verdict(metric, final, message, limit.relation, value, threshold, *interval)


def _paired_margins(metric: str, limit: Limit, figures: Figures, reference: Figures) -> tuple[float, float] | None:
    """How far below and above its value the value may lie, from items that both stages share; None where they do not pair."""
    items, reference_items = figures.items.get(metric), reference.items.get(metric)
    if items is None or reference_items is None:
        return None
    from compression.evaluation.bootstrap import middle, paired, resample

    if not paired(items, reference_items):
        return None
    values, reference_values = resample(f"{metric} {items.digest()} {reference_items.digest()}", items, reference_items)
    interval = middle(values - limit.threshold(reference_values))
    margin = figures.metrics[metric] - limit.threshold(reference.metrics[metric])
    return interval.low - margin, interval.high - margin


def _margins(metric: str, limit: Limit, threshold: float, figures: Figures, reference: Figures) -> tuple[float, float]:
    """The same from two independent intervals: MOVER (Zou and Donner 2008), which adds the distances to their ends in quadrature."""
    value = figures.metrics[metric]
    low, high = figures.interval(metric)
    if not limit.relative:
        return low - value, high - value
    thresholds = [limit.threshold(end) for end in reference.interval(metric)]
    return -math.hypot(value - low, max(thresholds) - threshold), math.hypot(high - value, threshold - min(thresholds))


def _message(
    metric: str, limit: Limit, bound: Bound, value: float, threshold: float, reference: float | None, outcome: Outcome, noise: float
) -> str:  # fmt: skip
    """`accuracy 0.79 is not at least 0.798 (base 0.8: a drop of 0.01, allowed 0.002); the limit is within the noise of ±0.013`."""
    unit = abs(reference) if limit.share and reference else None

    def amount(number: float) -> str:
        return f"{number:.3g}" if unit is None else _percent(number / unit)

    satisfied = value <= threshold if limit.relation == "at most" else value >= threshold
    text = f"{metric} {value:.5g} is {'' if satisfied else 'not '}{limit.relation} {threshold:.5g}"
    if reference is not None and limit.relative:
        change = "no change" if value == reference else f"a {'rise' if value > reference else 'drop'} of {amount(abs(value - reference))}"
        text += f" ({bound.relative_to} {reference:.5g}: {change}, allowed {amount(abs(threshold - reference))})"
    elif not satisfied:
        text += f" ({amount(abs(value - threshold))} too {'much' if limit.relation == 'at most' else 'little'})"
    if outcome == "INCONCLUSIVE":
        text += f"; the limit is within the noise of ±{amount(noise)}"
        return text + ", and the bound is strict, so it fails" if bound.strict else text
    return text + f", beyond the noise of ±{amount(noise)}" if outcome == "FAIL" and noise > 0 else text


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.0f}%" if abs(percent) >= 100 else f"{percent:.3g}%"
