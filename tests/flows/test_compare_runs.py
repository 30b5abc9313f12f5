"""Runs side by side: what differs, and what is better, worse, or noise."""

from typing import Any

import pytest
from rich.console import Console

from flows.report.compare import render_comparison
from flows.run_comparison import RunComparison, compare_runs
from flows.screen import print_comparison
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


def judged(found: RunComparison, metric: str, stage: str = "q") -> tuple[str, str] | None:
    figure = next(figure for figure in found.figures if figure.metric == metric)
    change = found.change(stage, 1, figure)
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
