"""Bounds on metrics, and the verdicts computed from records. Loosening a bound never runs a stage again. Imports no torch.

One rule judges every bound. The value has an interval of 95 %: that of the metric (its `_low` and `_high`), and where the limit is relative to another
stage, that of the difference: from the same items of both where there are some (compression/evaluation/bootstrap.py), else from both intervals.

    PASS          the value and all of its interval keep the limit
    FAIL          neither the value nor any of its interval does: the bound is broken beyond noise
    INCONCLUSIVE  in between: the limit lies within the noise. It stops nothing, unless the bound is `strict`: then it fails

A metric without an interval (a size) has no noise and is never INCONCLUSIVE, but what was timed while other programs had the cores: it fails no bound.
What is not a finite number fails, whatever the bound, and so does what is relative to one.
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
            raise ValueError(f"{value!r} is no share: write 5% or 0.05") from None
    return value


Increase = Annotated[float, Field(ge=0), BeforeValidator(_share, json_schema_input_type=Annotated[float, Field(ge=0)] | str)]
Decrease = Annotated[float, Field(ge=0, le=1), BeforeValidator(_share, json_schema_input_type=Annotated[float, Field(ge=0, le=1)] | str)]


class Bound(Settings):
    """Bounds of one metric: absolute, or relative to another stage's value of it. What breaks one beyond noise fails its stage."""

    min: float | None = Field(default=None, description="Smallest value that passes.")
    max: float | None = Field(default=None, description="Largest value that passes.")
    max_increase: Increase | None = Field(default=None, description="Largest relative increase over `relative_to`, as 0.05 or 5%.")
    max_decrease: Decrease | None = Field(default=None, description="Largest relative decrease from `relative_to`, as 0.05 or 5%.")
    max_rise: float | None = Field(default=None, ge=0, description="Largest increase over `relative_to`, in the metric's own unit.")
    max_drop: float | None = Field(
        default=None, ge=0, description="Largest decrease from `relative_to`, in the metric's own unit: 0.02 of accuracy is two points."
    )
    relative_to: str = Field(default="base", description="The stage to compare with: a name, `base` or `parent`.")
    strict: bool = Field(default=False, description="Whether it fails too what the noise leaves open (INCONCLUSIVE).")
    if_measured: bool = Field(default=False, description="Whether it says nothing where the metric was not measured, instead of failing.")

    @model_validator(mode="after")
    def _bounds_something(self) -> "Bound":
        if not any(True for _ in self.limits()):
            raise ValueError("a bound needs min, max, max_increase, max_decrease, max_rise or max_drop")
        return self

    @property
    def relative(self) -> bool:
        return any(limit.relative for limit in self.limits())

    def limits(self) -> "Iterator[Limit]":
        """Each of the limits it sets."""
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

    def words(self) -> str:
        """What it asks for: `at most 5% above base`."""
        told = [limit.words(self.relative_to) for limit in self.limits()]
        notes = [word for word, said in (("strict", self.strict), ("if measured", self.if_measured)) if said]
        return " and ".join(told) + (f" ({', '.join(notes)})" if notes else "")


@dataclass(frozen=True)
class Limit:
    """One limit of a bound: `amount` itself, or so much above or below a reference (a share of it, or in its unit)."""

    relation: Relation
    amount: float
    relative: bool = False
    share: bool = False

    def of(self, reference: Any) -> Any:
        """The number that bounds the value, given the reference's value, or many of them as an array; `reference` may be None of an absolute one."""
        if not self.relative:
            return self.amount
        return reference + (1 if self.relation == "at most" else -1) * self.amount * (abs(reference) if self.share else 1)

    def words(self, relative_to: str) -> str:
        if not self.relative:
            return f"{self.relation} {self.amount:g}"
        amount = _percent(self.amount) if self.share else f"{self.amount:g}"
        return f"at most {amount} {'above' if self.relation == 'at most' else 'below'} {relative_to}"


@dataclass(frozen=True)
class Figures:
    """What is known of a stage: its metrics, with the intervals among them, and the items that some are made of."""

    metrics: Mapping[str, float]
    items: Mapping[str, Items] = field(default_factory=dict)

    def interval(self, metric: str) -> tuple[float, float]:
        """How far the metric's noise reaches; where that is not known, the value twice."""
        return noise(self.metrics, metric) or (self.metrics[metric], self.metrics[metric])


@dataclass(frozen=True)
class Verdict:
    """One limit of one metric, judged.

    value, limit  of a metric that was measured, the limit as a number whatever it was relative to
    low, high     of 95 %: where the value lies, the reference held still (its noise is counted to the value's); None without noise
    """

    metric: str
    outcome: Outcome
    message: str
    relation: Relation | None = None
    value: float | None = None
    limit: float | None = None
    low: float | None = None
    high: float | None = None


def judge(bounds: Mapping[str, Bound], mine: Figures, others: Mapping[str, Figures]) -> list[Verdict]:
    """Judge every bound; `others` are the stages named by `relative_to`. A metric that is absent fails, unless the bound says `if_measured`."""
    return [verdict for metric, bound in bounds.items() for verdict in _judge_bound(metric, bound, mine, others)]


def _judge_bound(metric: str, bound: Bound, mine: Figures, others: Mapping[str, Figures]) -> Iterator[Verdict]:
    if metric not in mine.metrics:
        if not bound.if_measured:
            yield Verdict(metric, "FAIL", f"{metric} was not measured; measured: {', '.join(sorted(mine.metrics))}")
        return
    other = others.get(bound.relative_to, Figures({}))
    for limit in bound.limits():
        if limit.relative and metric not in other.metrics:
            if not bound.if_measured:
                yield Verdict(metric, "FAIL", f"{metric} of {bound.relative_to} was not measured, so nothing can be relative to it")
        else:
            yield _judge_limit(metric, limit, bound, mine, other)


def _judge_limit(metric: str, limit: Limit, bound: Bound, mine: Figures, other: Figures) -> Verdict:
    value = mine.metrics[metric]
    bar = limit.of(other.metrics.get(metric))
    if not (math.isfinite(value) and math.isfinite(bar)):
        whose = metric if not math.isfinite(value) else f"{metric} of {bound.relative_to}"
        return Verdict(metric, "FAIL", f"{whose} is not a finite number, so it keeps no bound", limit.relation, value, bar)
    margins = _paired_margins(metric, limit, mine, other) if limit.relative else None
    low, high = margins or _margins(metric, limit, bar, mine, other)
    low, high = value + min(low, 0.0), value + max(high, 0.0)
    kept, all_kept, any_kept = (
        (value <= bar, high <= bar, low <= bar) if limit.relation == "at most" else (value >= bar, low >= bar, high >= bar)
    )
    outcome: Outcome = "PASS" if kept and all_kept else "INCONCLUSIVE" if any_kept else "FAIL"
    noisy = high > low
    message = _message(metric, limit, bound, value, bar, other.metrics.get(metric), outcome, (high - low) / 2)
    if outcome == "FAIL" and (contended(mine.metrics, metric) or (limit.relative and contended(other.metrics, metric))):
        outcome, message = "INCONCLUSIVE", f"{message}, but other programs had the cores while it was timed (`edgepress run --remeasure`)"
    final: Outcome = "FAIL" if outcome == "INCONCLUSIVE" and bound.strict else outcome
    return Verdict(metric, final, message, limit.relation, value, bar, low if noisy else None, high if noisy else None)


def _paired_margins(metric: str, limit: Limit, mine: Figures, other: Figures) -> tuple[float, float] | None:
    """How far below and above its value the value may lie, from the items that both stages have; None where these do not pair."""
    one, reference = mine.items.get(metric), other.items.get(metric)
    if one is None or reference is None:
        return None
    from compression.evaluation.bootstrap import middle, paired, resample

    if not paired(one, reference):
        return None
    values, references = resample(f"{metric} {one.digest()} {reference.digest()}", one, reference)
    found = middle(values - limit.of(references))
    margin = mine.metrics[metric] - limit.of(other.metrics[metric])
    return found.low - margin, found.high - margin


def _margins(metric: str, limit: Limit, bar: float, mine: Figures, other: Figures) -> tuple[float, float]:
    """The same from both intervals, where measured apart: MOVER (Zou and Donner 2008), which adds the distances to their ends in quadrature."""
    value = mine.metrics[metric]
    low, high = mine.interval(metric)
    if not limit.relative:
        return low - value, high - value
    bars = [limit.of(end) for end in other.interval(metric)]
    return -math.hypot(value - low, max(bars) - bar), math.hypot(high - value, bar - min(bars))


def _message(
    metric: str, limit: Limit, bound: Bound, value: float, bar: float, reference: float | None, outcome: Outcome, noise: float
) -> str:  # fmt: skip
    """`accuracy 0.79 is not at least 0.798 (base 0.8: a drop of 0.01, allowed 0.002); the limit is within the noise of ±0.013`."""
    unit = abs(reference) if limit.share and reference else None

    def amount(number: float) -> str:
        return f"{number:.3g}" if unit is None else _percent(number / unit)

    kept = value <= bar if limit.relation == "at most" else value >= bar
    words = f"{metric} {value:.5g} is {'' if kept else 'not '}{limit.relation} {bar:.5g}"
    if reference is not None and limit.relative:
        change = "no change" if value == reference else f"a {'rise' if value > reference else 'drop'} of {amount(abs(value - reference))}"
        words += f" ({bound.relative_to} {reference:.5g}: {change}, allowed {amount(abs(bar - reference))})"
    elif not kept:
        words += f" ({amount(abs(value - bar))} too {'much' if limit.relation == 'at most' else 'little'})"
    if outcome == "INCONCLUSIVE":
        words += f"; the limit is within the noise of ±{amount(noise)}"
        return words + ", and the bound is strict, so it fails" if bound.strict else words
    return words + f", beyond the noise of ±{amount(noise)}" if outcome == "FAIL" and noise > 0 else words


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.0f}%" if abs(percent) >= 100 else f"{percent:.3g}%"
