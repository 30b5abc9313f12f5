"""Runs side by side: what was asked of them that differs, and what became of each stage. Imports no torch.

The first run is what the others are compared with. Stages are matched by name.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flows.report.rows import MANY, Row, leaves
from tasks.figures import Figure, measured, within_noise

Judgement = Literal["better", "worse", "noise", "same", "unlike"]
_OF_THE_MACHINE = ("tokens_per_second", "prefill_tokens_per_second", "peak_memory_mb")
_MACHINE_NOISE = 0.1  # of these from run to run, which is more than from repeat to repeat
_SAME_DATA = ("recipe.data", "base.content")  # where these differ, quality is of something else


@dataclass(frozen=True)
class Change:
    """What became of a figure: the difference as text (`+0.012`), and what it means.

    noise   no more than both measurements are uncertain by
    unlike  measured on other data, or on another machine: not to be compared
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

    names        of the runs in the journal
    differences  what was asked, or where it ran: values by run, by key; None where a run does not have it
    figures      what was measured in any of them
    stages       each stage's rows by run, None where a run does not have it; of very many only those that nothing follows
    left_out     how many stages are not among them
    """

    names: tuple[str, ...]
    differences: Mapping[str, tuple[Any, ...]]
    figures: tuple[Figure, ...]
    stages: Mapping[str, tuple[Row | None, ...]]
    left_out: int

    def change(self, stage: str, run: int, figure: Figure) -> Change | None:
        """What became of a figure from the first run that has the stage to this one; None where one of both lacks it."""
        first, row = next((row for row in self.stages[stage] if row), None), self.stages[stage][run]
        if first is None or row is None or first is row or not {figure.metric} <= first["metrics"].keys() & row["metrics"].keys():
            return None
        old, new = first["metrics"][figure.metric], row["metrics"][figure.metric]
        if figure.value(old) == figure.value(new):
            return Change("", "same")
        text = ("+" if new > old else "−") + figure.value(abs(new - old))
        return Change(text, self._judged(first, row, figure))

    def _judged(self, first: Row, row: Row, figure: Figure) -> Judgement:
        metric, old, new = figure.metric, first["metrics"][figure.metric], row["metrics"][figure.metric]
        if metric in _OF_THE_MACHINE:
            if "machine" in self.differences or "threads" in self.differences:
                return "unlike"
            if abs(new - old) <= _MACHINE_NOISE * max(old, new):
                return "noise"
        elif metric != "size_mb" and any(key.startswith(_SAME_DATA) for key in self.differences):
            return "unlike"
        if within_noise(first["metrics"], row["metrics"], metric):
            return "noise"
        return "better" if (new - old) * figure.better > 0 else "worse" if figure.better else "same"


def compare_runs(summaries: Sequence[Mapping[str, Any]]) -> RunComparison:
    """Compare summaries (flows/summary.py) of two or more runs."""
    rows: list[Sequence[Row]] = [summary["rows"] for summary in summaries]
    by_name = [{row["stage"]: row for row in of_one} for of_one in rows]
    stages = list(dict.fromkeys(name for of_one in by_name for name in of_one))
    kept = stages
    if len(stages) > MANY:
        ends = {row["stage"] for of_one in rows for row in leaves(of_one)}
        kept = [name for name in stages if name in ends or name == "base"]
    return RunComparison(
        names=tuple(summary["journal"] for summary in summaries),
        differences=_differences([_asked(summary) for summary in summaries]),
        figures=tuple(f for f in measured(row["metrics"] for of_one in rows for row in of_one) if f.metric != "accuracy_stderr"),
        stages={name: tuple(of_one.get(name) for of_one in by_name) for name in kept},
        left_out=len(stages) - len(kept),
    )


def _asked(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe and the environment by key, `recipe.stages.gptq.bits`."""
    environment = summary["environment"]
    machine = ", ".join(f"{key} {value}" for key, value in sorted(environment["machine"].items()))
    recipe = {key: value for key, value in summary["recipe"].items() if key != "name"}
    plain = {key: environment[key] for key in ("edgepress", "device", "threads", "base")}
    return dict(_flat({"recipe": recipe, "machine": machine, **plain}, ""))


def _flat(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, below in value.items():
            yield from _flat(below, f"{key}.{name}" if key else name)
    else:
        yield key, value


def _differences(asked: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """Values by key, of keys whose values are not equal in all."""
    keys = dict.fromkeys(key for one in asked for key in one)
    found = {key: tuple(one.get(key) for one in asked) for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}
