"""Runs side by side: what differs, and what is better, worse, or noise."""

from typing import Any

import pytest
from rich.console import Console

from compression.data import DataSpec
from compression.evaluation.spec import EvaluationSpec
from flows.cli.screen import print_comparison
from flows.report.compare import render_comparison
from flows.report.run_comparison import _GIVES, _OF_THE_MACHINE, RunComparison, _measurement, compare_runs
from tasks.measurement.figures import FIGURES
from tasks.measurement.kinds import MEASUREMENTS
from tasks.measurement.measurement import MeasurementRequest
from tasks.stage import Artifact
from tests.flows.summaries import Summary, row, summary
from tests.flows.test_report import read

METRICS = {"accuracy": 0.8, "accuracy_stderr": 0.01, "perplexity": 4.0, "size_mb": 5.0, "tokens_per_second": 100.0}


def run(number: int, metrics: dict[str, float], *more: Summary, bits: int = 4, **environment: Any) -> Summary:
    rows = [row("base", [], metrics=METRICS), row("q", ["base"], metrics={**METRICS, **metrics}), *more]
    made = summary(
        rows, journal=f"demo-{number}", recipe={"name": "demo", "data": {"text": "t"}, "stages": {"q": {"uses": "k", "bits": bits}}}
    )
    made["environment"].update(environment)
    return made


def judged(found: RunComparison, metric: str, stage: str = "q", number: int = 1) -> tuple[str, str] | None:
    figure = next(figure for figure in found.figures if figure.metric == metric)
    change = found.change(stage, number, figure)
    return (change.text, change.judgement) if change else None


@pytest.mark.parametrize(
    ("metric", "value", "expected"),
    [
        ("accuracy", 0.9, ("+0.100", "better")),
        ("accuracy", 0.7, ("−0.100", "worse")),
        ("accuracy", 0.82, ("+0.020", "noise")),
        ("accuracy", 0.8, ("", "same")),
        ("perplexity", 3.0, ("−1.000", "better")),
        ("perplexity", 5.0, ("+1.000", "worse")),
        ("size_mb", 6.0, ("+1.00", "worse")),
        ("tokens_per_second", 91.0, ("−9", "noise")),
        ("tokens_per_second", 150.0, ("+50", "better")),
    ],
)
def test_a_difference_is_better_worse_or_noise(metric: str, value: float, expected: tuple[str, str]) -> None:
    assert judged(compare_runs([run(1, {}), run(2, {metric: value})]), metric) == expected


def test_what_was_measured_otherwise_is_not_judged() -> None:
    machine = compare_runs([run(1, {}), run(2, {"tokens_per_second": 900.0, "accuracy": 0.9}, machine={"host": "other"})])
    assert judged(machine, "tokens_per_second") == ("+800", "unlike") and judged(machine, "accuracy") == ("+0.100", "better")
    other = run(2, {"accuracy": 0.9, "size_mb": 4.0})
    other["recipe"]["data"]["text"] = "u"
    data = compare_runs([run(1, {}), other])
    assert judged(data, "accuracy") == ("+0.100", "unlike") and judged(data, "size_mb") == ("−1.00", "better")


MORE = {
    "accuracy": 0.5, "exact_match": 0.5, "rouge_l": 0.5, "refusal_rate": 0.5, "harness.towns.acc": 0.5, "tokens_per_second": 100.0,
    "token_seconds_p95": 0.01, "energy_joules": 20.0, "energy_joules_per_token": 0.5, "size_mb": 5.0,
}  # fmt: skip


def marks(*summaries: Summary, number: int = 1) -> dict[str, list[str]]:
    """Metrics by what became of each: all of them are half as large again."""
    for other in summaries[1:]:
        other["rows"][1]["metrics"] = {metric: 1.5 * value for metric, value in MORE.items()}
    summaries[0]["rows"][1]["metrics"] = MORE
    found, by_mark = compare_runs(summaries), dict[str, list[str]]()
    for metric in MORE:
        change = judged(found, metric, number=number)
        assert change
        by_mark.setdefault(change[1], []).append(metric)
    return by_mark


BETTER = ["accuracy", "exact_match", "rouge_l", "refusal_rate", "harness.towns.acc"]
COST = ["token_seconds_p95", "energy_joules", "energy_joules_per_token"]


@pytest.mark.parametrize("environment", [{"machine": {"host": "other"}}, {"threads": 1}, {"device": "cuda"}])
def test_what_the_machine_decides_is_not_judged_on_another(environment: dict[str, Any]) -> None:
    found = marks(run(1, {}), run(2, {}, **environment))
    assert found == {"better": BETTER, "unlike": ["tokens_per_second", *COST], "worse": ["size_mb"]}


def test_prompts_of_another_length_make_other_costs() -> None:
    longer, more = run(2, {}), run(2, {})
    longer["recipe"]["data"]["length"] = 64
    more["recipe"]["evaluation"] = {"new_tokens": 64}
    assert marks(run(1, {}), longer)["unlike"] == ["accuracy", "tokens_per_second", *COST]
    assert marks(run(1, {}), more)["unlike"] == [*BETTER[1:], *COST]


def test_figures_are_judged_where_they_were_measured_with_the_same() -> None:
    """By the digests of the measurements, whatever the recipe says of its data."""
    first = {"quality": "1", "harness": "3", "question_answering": "4", "summarization": "5", "red_team": "6"}
    trained = run(2, {}, measured_with=first, data="d2")
    trained["recipe"]["data"]["train_documents"] = 7
    assert "unlike" not in marks(run(1, {}, measured_with=first, data="d1"), trained)
    edited = [run(1, {}, measured_with=first, data="d1"), run(2, {}, measured_with={**first, "quality": "9"}, data="d2")]
    assert marks(*edited)["unlike"] == ["accuracy"]
    assert compare_runs(edited).differences == {"data": ("d1", "d2"), "measured_with.quality": ("1", "9")}
    limited = {**first, "harness": "9", "question_answering": "9"}
    assert marks(run(1, {}, measured_with=first), run(2, {}, measured_with=limited))["unlike"] == ["exact_match", "harness.towns.acc"]
    tasks = [{**first, "harness.towns": "3"}, {**first, "harness.towns": "3", "harness.more": "7"}, {**first, "harness.towns": "4"}]
    one, more, other = (
        run(number, {}, measured_with={k: v for k, v in each.items() if k != "harness"}) for number, each in enumerate(tasks, 1)
    )
    assert "unlike" not in marks(one, more) and marks(one, other)["unlike"] == ["harness.towns.acc"]
    third = [run(1, {}, measured_with=first), run(2, {}, measured_with=limited), run(3, {}, measured_with=first)]
    assert "unlike" not in marks(*third, number=2), "what a run in between was measured with is no matter"


def test_summaries_without_digests_are_judged_by_what_the_recipe_says() -> None:
    asked = run(2, {}, measured_with={"quality": "1", "harness": "3"}, data="d2")
    asked["recipe"]["evaluation"] = {"limit": 10}
    found = marks(run(1, {}), asked)
    assert found["unlike"] == ["exact_match", "rouge_l", "refusal_rate", "harness.towns.acc"]
    assert compare_runs([run(1, {}), asked]).differences.keys() == {"recipe.evaluation.limit"}
    data = run(2, {})
    data["recipe"]["data"]["text"] = "u"
    assert marks(run(1, {}), data)["unlike"] == ["accuracy"]


def test_every_figure_is_known_by_the_measurement_that_gives_it() -> None:
    settings = EvaluationSpec(
        suite="release", harness=("arc_easy",), question_answering="embedded", summarization="x.jsonl", energy="estimate"
    )
    data = DataSpec.model_validate({"text": "embedded", "questions": "embedded"})
    request = MeasurementRequest(Artifact("llama.cpp", "carried", 1), ("base", "parent"), data, settings)
    for one in MEASUREMENTS:
        given = [f.metric for f in FIGURES if f.metric in one.metrics(request) and f.better]
        assert [_measurement(metric) for metric in given] == [one.name] * len(given)
        assert one.exclusive == (one.name in _OF_THE_MACHINE)
    assert {metric for metrics in _GIVES.values() for metric in metrics} <= {figure.metric for figure in FIGURES}


def test_what_was_asked_otherwise_is_listed() -> None:
    found = compare_runs([run(1, {}), run(2, {}, bits=3, edgepress="0.2"), run(3, {})])
    assert found.differences == {"recipe.stages.q.bits": (4, 3, 4), "edgepress": ("0.1", "0.2", "0.1")}
    assert compare_runs([run(1, {}), run(2, {})]).differences == {}


def test_stages_that_a_run_does_not_have() -> None:
    found = compare_runs([run(1, {}, row("old", ["q"], metrics={"accuracy": 0.5})), run(2, {}, row("new", ["q"]))])
    assert list(found.stages) == ["base", "q", "old", "new"]
    assert found.stages["old"][1] is None and judged(found, "accuracy", "old") is judged(found, "accuracy", "new") is None


def test_of_very_many_stages_those_remain_that_nothing_follows() -> None:
    many = [row(f"a@{n}", ["q"]) for n in range(30)] + [row(f"b@{n}", [f"a@{n}"]) for n in range(30)]
    found = compare_runs([run(1, {}, *many), run(2, {}, *many)])
    assert list(found.stages) == ["base", *(f"b@{n}" for n in range(30))] and found.left_out == 31


def test_it_is_shown_in_the_terminal_and_as_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    summaries = [run(1, {}), run(2, {"accuracy": 0.9, "size_mb": 6.0}, row("new<", ["q"], "Failed"), bits=3)]
    found = compare_runs(summaries)
    print_comparison(Console(width=200), found)
    told = capsys.readouterr().out
    words = read(page := render_comparison(found, summaries))
    for text in ("demo-1", "demo-2", "recipe.stages.q.bits", "+0.100", "+1.00", "new<", "failed"):
        assert text in told and text in words
    assert '<span class="better">+0.100 ✓</span>' in page and '<span class="worse">+1.00 ✗</span>' in page
