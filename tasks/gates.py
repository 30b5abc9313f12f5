"""Bounds on metrics, and the verdicts computed from records. Loosening a bound never runs a stage again. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Outcome = Literal["PASS", "FAIL"]


def _share(value: object) -> object:
    """Accept "5%" for 0.05."""
    if isinstance(value, str) and value.strip().endswith("%"):
        return float(value.strip()[:-1]) / 100
    return value


Share = Annotated[float, Field(ge=0), BeforeValidator(_share, json_schema_input_type=Annotated[float, Field(ge=0)] | str)]


class Bound(BaseModel):
    """Bounds of one metric: absolute, or relative to another stage's value of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min: float | None = Field(default=None, description="Smallest value that passes.")
    max: float | None = Field(default=None, description="Largest value that passes.")
    max_increase: Share | None = Field(default=None, description="Largest relative increase over `relative_to`, as 0.05 or 5%.")
    max_decrease: Share | None = Field(default=None, description="Largest relative decrease from `relative_to`, as 0.05 or 5%.")
    relative_to: str = Field(default="base", description="The stage to compare with: a name, `base` or `parent`.")

    @model_validator(mode="after")
    def _bounds_something(self) -> "Bound":
        if all(v is None for v in (self.min, self.max, self.max_increase, self.max_decrease)):
            raise ValueError("a bound needs min, max, max_increase or max_decrease")
        return self


@dataclass(frozen=True)
class Verdict:
    """One bound of one metric, judged."""

    metric: str
    outcome: Outcome
    message: str


def judge(bounds: Mapping[str, Bound], metrics: Mapping[str, float], others: Mapping[str, Mapping[str, float]]) -> list[Verdict]:
    """Judge every bound; `others` are the metrics of the stages named by `relative_to`. A metric that is absent fails."""
    return [verdict for metric, bound in bounds.items() for verdict in _judge_one(metric, bound, metrics, others)]


def _judge_one(metric: str, bound: Bound, metrics: Mapping[str, float], others: Mapping[str, Mapping[str, float]]) -> list[Verdict]:
    if metric not in metrics:
        return [Verdict(metric, "FAIL", f"{metric} was not measured; measured: {', '.join(sorted(metrics))}")]
    value = metrics[metric]
    found = []

    def add(passed: bool, relation: str, limit: float, note: str = "") -> None:
        found.append(
            Verdict(
                metric, "PASS" if passed else "FAIL", f"{metric} {value:.5g} {'is' if passed else 'is not'} {relation} {limit:.5g}{note}"
            )
        )

    if bound.min is not None:
        add(value >= bound.min, "at least", bound.min)
    if bound.max is not None:
        add(value <= bound.max, "at most", bound.max)
    if bound.max_increase is not None or bound.max_decrease is not None:
        reference = others.get(bound.relative_to, {}).get(metric)
        if reference is None:
            return [*found, Verdict(metric, "FAIL", f"{metric} of {bound.relative_to} was not measured, so nothing can be relative to it")]
        note = f" ({bound.relative_to} {reference:.5g})"
        if bound.max_increase is not None:
            add(value <= reference * (1 + bound.max_increase), "at most", reference * (1 + bound.max_increase), note)
        if bound.max_decrease is not None:
            add(value >= reference * (1 - bound.max_decrease), "at least", reference * (1 - bound.max_decrease), note)
    return found
