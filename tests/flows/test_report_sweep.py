"""The cells of a sweep in the report and in the terminal."""

import pytest
from rich.console import Console

from flows.cli.screen import print_summary
from flows.report import render_report
from flows.report.comparison import compare
from tests.flows.summaries import sweep


def test_the_best_of_each_metric_is_marked() -> None:
    grid = [{"q.bits": b, "q.group_size": g} for b in (2, 4) for g in (32, 64)]
    summary = sweep(
        grid, lambda v: {"accuracy": v["q.bits"] / 10, "size_mb": v["q.bits"] + 1 / v["q.group_size"], "tokens_per_second": 5.0}
    )
    found = compare(summary)
    assert found.keys == ("bits", "group_size")
    assert [line.best for line in found.lines] == [set(), {"size_mb"}, {"accuracy"}, {"accuracy"}]
    page = render_report(summary)
    assert page.count('class="best"') + page.count("class=best") == 3
    assert page.partition("The graph")[0].count("<polyline") == 2 * 3, "a line for each group size in each of three charts"


def test_seeds_are_averaged(capsys: pytest.CaptureFixture[str]) -> None:
    grid = [{"q.bits": b, "seed": s} for b in (2, 4) for s in (0, 1, 2)]
    summary = sweep(grid, lambda v: {"perplexity": v["q.bits"] + v["seed"]})
    page = render_report(summary)
    assert "perplexity 3, mean of 3" in page and "perplexity 5, mean of 3" in page and "Means over the seeds" in page
    print_summary(Console(width=200), summary)
    assert "6 cells" in capsys.readouterr().out


def test_a_sweep_over_seeds_alone_has_them_along_x() -> None:
    page = render_report(sweep([{"seed": s} for s in (0, 1)], lambda v: {"perplexity": 1.0 + v["seed"]}))
    assert ">seed</text>" in page and "Means" not in page


def test_three_keys_have_charts_of_their_own() -> None:
    grid = [{"a": a, "b": b, "c": c} for a in (1, 2, 3, 4) for b in (1, 2, 3) for c in (1, 2, 3)]
    page = render_report(sweep(grid, lambda v: {"perplexity": 10.0 * v["a"] + v["b"], "size_mb": 1.0}))
    charts = page.partition("The graph")[0]
    assert charts.count("<svg") == 3 * 2, "of two metrics each"
    assert "perplexity 12, mean of 9" in charts and "perplexity 22, mean of 9" in charts and "Means over all other values" in charts


def test_what_failed_is_the_best_of_nothing() -> None:
    summary = sweep([{"q.bits": b} for b in (2, 3, 4)], lambda v: {"size_mb": v["q.bits"], "perplexity": 9.0 - v["q.bits"]})
    summary["rows"][1]["state"] = "Failed"
    assert [line.best for line in compare(summary).lines] == [set(), {"size_mb"}, {"perplexity"}]
