"""Runs side by side: what was asked of them that differs, and what became of each stage. Imports no torch.

The first run is what the others are compared with. Stages are matched by name.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flows.report.rows import MANY, Row, leaves
from tasks.measurement.figures import Figure, contended, measured, within_noise

Judgement = Literal["better", "worse", "noise", "same", "unlike"]
_GIVES = {  # of each measurement (tasks/measurement/kinds.py) the figures; those of the harness begin with its name, and what is not here the files alone tell
    "quality": ("accuracy", "accuracy_stderr", "perplexity", "kl_to_base", "top1_agreement"),
    "question_answering": ("exact_match", "f1"),
    "summarization": ("rouge_l",),
    "red_team": ("refusal_rate", "over_refusal_rate"),
    "speed": ("tokens_per_second", "prefill_tokens_per_second", "peak_memory_mb"),
    "latency": ("token_seconds_p95",),
    "energy": ("energy_joules", "energy_joules_per_token", "energy_joules_per_token_estimated"),
}
_OF_THE_MACHINE = ("speed", "latency", "energy")
_MACHINE = ("machine", "device", "threads")
_PROMPT = ("recipe.data.length", "recipe.evaluation.new_tokens")  # how long it is, and what is written after it; what it says takes no time
_SAID = {"quality": ("recipe.data",), "speed": _PROMPT[:1], "latency": _PROMPT, "energy": _PROMPT}  # in recipes; of others `evaluation`
_MACHINE_NOISE = 0.1  # of these from run to run, which is more than from repeat to repeat


@dataclass(frozen=True)
class Change:
    """What became of a figure: the difference as text (`+0.012`), and what it means.

    noise   no more than both measurements are uncertain by
    unlike  measured with other data or settings, on another machine, or while other programs had its cores: not to be compared
    """

    text: str
    judgement: Judgement

    @property
    def marked(self) -> str:
        """The difference with a mark that needs no colour; empty where there is none."""
        marks = {"better": " ✓", "worse": " ✗", "noise": " ~", "unlike": " ?", "same": ""}
        return self.text and self.text + marks[self.judgement]


@dataclass(frozen=True)
class RunComparison:
    """Summaries of runs, and what differs.

    names          of the runs in the journal
    differences    what was asked, or where it ran: values by run, by key; None where a run does not have it
    measured_with  of each run the digests of data and settings by measurement; empty where an older edgepress kept none
    figures        what was measured in any of them
    stages         each stage's rows by run, None where a run does not have it; of very many only those that nothing follows
    left_out       how many stages are not among them
    """

    names: tuple[str, ...]
    differences: Mapping[str, tuple[Any, ...]]
    measured_with: tuple[Mapping[str, str], ...]
    figures: tuple[Figure, ...]
    stages: Mapping[str, tuple[Row | None, ...]]
    left_out: int

    def change(self, stage: str, run: int, figure: Figure) -> Change | None:
        """What became of a figure from the first run that has the stage to this one; None where one of both lacks it."""
        number, first = next(((number, row) for number, row in enumerate(self.stages[stage]) if row), (run, None))
        row = self.stages[stage][run]
        if first is None or row is None or first is row or not {figure.metric} <= first["metrics"].keys() & row["metrics"].keys():
            return None
        old, new = first["metrics"][figure.metric], row["metrics"][figure.metric]
        if figure.value(old) == figure.value(new):
            return Change("", "same")
        text = ("+" if new > old else "−") + figure.value(abs(new - old))
        measurement = _measurement(figure.metric)
        unlike = measurement is not None and self._unlike(measurement, figure.metric, number, run)
        unlike = unlike or any(contended(one["metrics"], figure.metric) for one in (first, row))
        return Change(text, "unlike" if unlike else _judged(first, row, figure, measurement))

    def _unlike(self, measurement: str, metric: str, one: int, other: int) -> bool:
        """Whether two runs did not make a measurement of a metric in the same way."""
        said = _SAID.get(measurement, ("recipe.evaluation",))
        if measurement in _OF_THE_MACHINE:
            return self._differ((*said, *_MACHINE), one, other)
        with_one, with_other = (self._digests(measurement, metric, run) for run in (one, other))
        if with_one and with_other:
            return with_one != with_other or self._differ(("base.content",), one, other)
        return self._differ((*said, "base.content"), one, other)

    def _digests(self, measurement: str, metric: str, run: int) -> set[str]:
        """Of the part of a measurement that gives a metric, as far as its name tells; else of all its parts."""
        parts = {name: found for name, found in self.measured_with[run].items() if name.split(".")[0] == measurement}
        return {found for name, found in parts.items() if metric.startswith(f"{name}.")} or set(parts.values())

    def _differ(self, keys: Sequence[str], one: int, other: int) -> bool:
        """Whether two runs differ in one of these keys, or in one below them."""
        return any(
            f"{found}.".startswith(f"{key}.") and values[one] != values[other] for found, values in self.differences.items() for key in keys
        )


def _measurement(metric: str) -> str | None:
    """The measurement that gives a metric; None of what the files alone tell."""
    if metric.startswith("harness."):
        return "harness"
    return next((measurement for measurement, metrics in _GIVES.items() if metric in metrics), None)


def _judged(first: Row, row: Row, figure: Figure, measurement: str | None) -> Judgement:
    old, new = first["metrics"][figure.metric], row["metrics"][figure.metric]
    if measurement in _OF_THE_MACHINE and abs(new - old) <= _MACHINE_NOISE * max(old, new):
        return "noise"
    if within_noise(first["metrics"], row["metrics"], figure.metric):
        return "noise"
    return "better" if (new - old) * figure.better > 0 else "worse" if figure.better else "same"


def compare_runs(summaries: Sequence[Mapping[str, Any]]) -> RunComparison:
    """Compare summaries (flows/run/summary.py) of two or more runs."""
    rows: list[Sequence[Row]] = [summary["rows"] for summary in summaries]
    by_name = [{row["stage"]: row for row in of_one} for of_one in rows]
    stages = list(dict.fromkeys(name for of_one in by_name for name in of_one))
    kept = stages
    if len(stages) > MANY:
        ends = {row["stage"] for of_one in rows for row in leaves(of_one)}
        kept = [name for name in stages if name in ends or name == "base"]
    return RunComparison(
        names=tuple(summary["journal"] for summary in summaries),
        differences=_differences(summaries),
        measured_with=tuple(summary["environment"].get("measured_with", {}) for summary in summaries),
        figures=tuple(f for f in measured(row["metrics"] for of_one in rows for row in of_one) if f.metric != "accuracy_stderr"),
        stages={name: tuple(of_one.get(name) for of_one in by_name) for name in kept},
        left_out=len(stages) - len(kept),
    )


def _asked(summary: Mapping[str, Any], digests: Sequence[str]) -> dict[str, Any]:
    """The recipe and the environment by key, `recipe.stages.gptq.bits`; of the environment's digests these."""
    environment = summary["environment"]
    machine = ", ".join(f"{key} {value}" for key, value in sorted(environment["machine"].items()))
    recipe = {key: value for key, value in summary["recipe"].items() if key != "name"}
    plain = {key: environment[key] for key in ("edgepress", "device", "threads", "base", *digests)}
    return dict(_flat({"recipe": recipe, "machine": machine, **plain}, ""))


def _flat(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, below in value.items():
            yield from _flat(below, f"{key}.{name}" if key else name)
    else:
        yield key, value


def _differences(summaries: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """Values by key, of keys whose values are not equal in all."""
    digests = [key for key in ("data", "measured_with") if all(key in summary["environment"] for summary in summaries)]
    asked = [_asked(summary, digests) for summary in summaries]
    keys = dict.fromkeys(key for one in asked for key in one)
    found = {key: tuple(one.get(key) for one in asked) for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}
