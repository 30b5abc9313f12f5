"""The page about a run: it stands alone, says everything, and its pictures are where the values are."""

import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from flows.report import render_report
from flows.report.graph import graph_section
from flows.report.layers import heatmap
from flows.report.rows import leaves, shown, with_ancestors
from flows.report.samples import samples_section
from flows.report.waterfall import waterfall_section
from tests.flows.summaries import row, summary, sweep

VOID = {"meta"}

ROWS = [
    row(
        "base", [], metrics={"accuracy": 0.9, "perplexity": 4.0, "size_mb": 9.0, "tokens_per_second": 100.0, "parameters": 4e6},
        details={"samples": [{"prompt": "The <capital>", "text": "is Morva & old"}]},
    ),
    row(
        "prune", ["base"], "Cached",
        {"accuracy": 0.5, "size_mb": 6.0, "tokens_per_second": 140.0, "accuracy_low": 0.4, "accuracy_high": 0.6},
        warnings=["width 96 & K-quants"], curves=[[1, {"loss": 2.0, "loss_kd": 1.5, "learning_rate": 7.7}], [2, {"loss": 1.0, "loss_kd": 0.5}]],
        layers={f"model.layers.{b}.mlp.{p}": {"relative_error": 0.1 * (b + 1), "sparsity": 0.5} for b in range(12) for p in ("up", "down")},
        details={"samples": [{"prompt": "The <capital>", "text": "is Morva or not"}]},
        verdicts=[{"metric": "accuracy", "outcome": "FAIL", "message": "accuracy 0.5 < 0.6", "value": 0.5, "limit": 0.6, "low": 0.41, "high": 0.59}],
    ),
    row("gguf", ["prune"], metrics={"accuracy": 0.49, "size_mb": 2.0}),
    row("onnx", ["prune"], "Failed", reason="<boom>"),
    row("later", ["onnx"], "Skipped", reason="onnx failed"),
]  # fmt: skip
SUMMARY = summary(ROWS, name="demo <1>")


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.words = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.links += [v or "" for k, v in attributes if k in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None: ...

    def handle_data(self, data: str) -> None:
        self.words += data


def read(page: str) -> str:
    """The words of a page that is whole and stands alone."""
    reader = Reader()
    reader.feed(page)
    assert (reader.open, reader.links) == ([], [])
    assert not re.search(r"url\(|@import|https?://|<script", page)
    return reader.words


def sections(page: str) -> dict[str, str]:
    return dict(re.findall(r"<section><h2>(.*?)</h2>(.*?)</section>", page, re.DOTALL))


def svgs(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page)]


def test_the_page_stands_alone_and_says_everything() -> None:
    page = render_report(SUMMARY)
    words = read(page)
    assert "prefers-color-scheme: dark" in page
    for text in ("demo <1>", "demo-1", "<boom>", "width 96 & K-quants", "accuracy 0.5 < 0.6", "0.900", "4.000", "cached", "models/x"):
        assert text in words
    assert page.index("<boom>".replace("<", "&lt;").replace(">", "&gt;")) < page.index("<section>"), "failures come first"
    assert page.index("K-quants") < page.index("<section>"), "then warnings"
    found = sections(page)
    assert list(found) == [
        "The graph", "Every stage", "What it bought", "Where accuracy went", "Gates and proofs", "Training", "What it says", "Layers", "Environment",
    ]  # fmt: skip
    assert [len(svg.findall("circle")) for svg in svgs(found["What it bought"])] == [3, 2]
    assert page == render_report(SUMMARY)


def test_a_run_without_figures_has_a_page_too() -> None:
    page = render_report(summary([row("base", [])]))
    assert list(sections(page)) == ["The graph", "Every stage", "Environment"]
    assert "Warnings" not in page and "alert" not in page.partition("<body>")[2]


def test_the_graph_has_a_box_a_stage_and_a_line_a_need() -> None:
    rows = [*ROWS, row("student", ["prune", "base"])]
    (graph,) = svgs(graph_section(rows))
    assert len(graph.findall(".//rect")) == 6
    paths = graph.findall("path")
    assert len(paths) == 6 and sum("stroke-dasharray" in path.attrib for path in paths) == 1, "the teacher's line is dashed"
    classes = {group.findtext("title", ""): group.find("rect").get("class") for group in graph.findall("g")}  # type: ignore[union-attr]
    assert classes["onnx, kind: failed · 1.5 s"] == "Failed" and classes["later, kind: skipped · 1.5 s"] == "Skipped"


def test_of_a_wide_sweep_the_copies_of_a_stage_are_one_box() -> None:
    rows = [row("base", []), *(row(f"q@bits={n}", ["base"], "Failed" if n == 7 else "Completed") for n in range(100))]
    (graph,) = svgs(graph_section(rows))
    assert len(graph.findall(".//rect")) == 2
    assert graph.findall("g")[1].findtext("title") == "q, kind: 99 completed, 1 failed; 150.0 s together"
    assert graph.findall(".//rect")[1].get("class") == "Failed"


def test_each_bar_of_the_waterfall_reaches_from_its_parent_to_itself() -> None:
    html = waterfall_section(ROWS)
    (chart,) = svgs(html)
    texts = [text.text or "" for text in chart.findall("text")]
    assert "0.500 (-0.400)" in texts and "0.490 (-0.010)" in texts and "failed, not measured" in texts
    assert [text for text in texts if text.endswith(("gguf", "onnx", "later"))] == ["├ gguf", "└ onnx", "  later"]
    prune, gguf = chart.findall("rect")
    marks = {
        int(float(text.text or 0) * 10): float(text.get("x", ""))
        for text in chart.findall("text")
        if re.fullmatch("0.[0-9]", text.text or "")
    }

    def at(value: float) -> float:
        return marks[4] + (value - 0.4) * (marks[8] - marks[4]) / 0.4

    assert float(prune.get("x", "")) == pytest.approx(at(0.5), abs=0.2)
    assert float(prune.get("x", "")) + float(prune.get("width", "")) == pytest.approx(at(0.9), abs=0.2)
    assert float(gguf.get("x", "")) == pytest.approx(at(0.49), abs=0.2)
    assert prune.get("fill") == "var(--Failed)"


def test_any_name_and_any_difference_can_be_drawn() -> None:
    rows = [row("base", [], metrics={"perplexity": 1.719}), row("a<b>&", ["base"], metrics={"perplexity": 1.719 + 4e-11})]
    (chart,) = svgs(waterfall_section(rows))
    (title,) = [title.text for bar in chart.findall("rect") for title in bar.findall("title")]
    assert title == "a<b>&: 1.719 to 1.719"


def test_no_whisker_of_an_accuracy_leaves_0_to_1() -> None:
    paired = {"accuracy": 0.1, "accuracy_delta": -0.2, "accuracy_delta_low": -0.5, "accuracy_delta_high": 0.1}
    html = waterfall_section([row("base", [], metrics={"accuracy": 0.3}), row("a", ["base"], metrics=paired)])
    assert "difference from the base" in html and not re.search(">-[0-9]", html)


def test_the_waterfall_takes_perplexity_where_there_is_no_accuracy() -> None:
    rows = [row("base", [], metrics={"perplexity": 4.0}), row("a", ["base"], metrics={"perplexity": 400.0, "perplexity_ratio": 100.0,
            "perplexity_ratio_low": 90.0, "perplexity_ratio_high": 110.0}), row("b", ["a"], metrics={"perplexity": 5.0})]  # fmt: skip
    html = waterfall_section(rows)
    (chart,) = svgs(html)
    assert "perplexity (logarithmic)" in html and "difference from the base" in html
    assert [bar.get("fill") for bar in chart.findall("rect")] == ["var(--Failed)", "var(--Completed)"], "lower is better"
    assert waterfall_section(rows[:1]) == ""


def test_curves_have_a_line_for_each_loss() -> None:
    training = sections(render_report(SUMMARY))["Training"]
    (chart,) = svgs(training)
    assert len(chart.findall("polyline")) == 2 and "loss_kd" in training and "learning_rate" not in training


def test_a_total_of_one_term_is_drawn_once_and_long_curves_are_thinned() -> None:
    curve = [[step, {"loss": 1 / step, "loss_kd": 1 / step}] for step in range(1, 5001)]
    rows = [row("base", []), row("d", ["base"], curves=curve), row("d@2", ["base"], curves=curve)]
    one, both = (svgs(sections(render_report(summary(some)))["Training"]) for some in (rows[:2], rows))
    (line,) = one[0].findall("polyline")
    assert 200 < len((line.get("points") or "").split()) <= 302
    assert [len(chart.findall("polyline")) for chart in both] == [2], "the copies of a stage are lines of one chart"


def test_control_characters_of_a_sample_are_shown_and_no_part_of_the_page() -> None:
    told = {"samples": [{"prompt": "a\x07", "text": "b\x00\nc"}]}
    row = {"stage": "base", "needs": [], "state": "Completed", "metrics": {}, "details": told}
    assert "a\u2407" in (section := samples_section([row])) and "b\u2400\nc" in section


def test_samples_show_where_they_leave_the_base() -> None:
    said = sections(render_report(SUMMARY))["What it says"]
    assert "“The &lt;capital&gt;”" in said and "is Morva &amp; old" in said
    assert '<span class="dim">is Morva </span>or not' in said


def test_layers_are_a_map_and_what_is_equal_is_said() -> None:
    found = sections(render_report(SUMMARY))["Layers"]
    (chart,) = svgs(found)
    assert len(chart.findall("rect")) == 24 and "sparsity 0.5 in every layer" in found
    assert "largest: 1.2 in model.layers.11.mlp.up" in found
    strengths = {
        r.findtext("title"): float(r.get("fill-opacity", ""))
        for r in svgs(heatmap({"a.0.x": 1e-4, "a.1.x": 1e-2, "a.2.x": 1.0}, "e"))[0].findall("rect")
    }
    low, middle, high = strengths.values()
    assert middle - low == pytest.approx(high - middle, abs=0.011), "by logarithms where values are far apart"


def test_verdicts_say_value_limit_and_interval() -> None:
    verdicts = [*ROWS[1]["verdicts"], {"metric": "size_mb", "outcome": "PASS", "message": "small", "value": None, "limit": None},
                {"metric": "kl", "outcome": "INCONCLUSIVE", "message": "within noise"}]  # fmt: skip
    found = sections(render_report(summary([row("base", []), row("q", ["base"], verdicts=verdicts)])))["Gates and proofs"]
    assert "<td>0.5</td><td>0.6</td><td>0.41–0.59</td>" in found
    assert re.findall('<td class="words strong \\w+">(.*?)</td>', found) == ["FAIL", "INCONCLUSIVE", "PASS"], (
        "what is not passed comes first"
    )


def test_what_many_stages_say_alike_stands_there_once() -> None:
    rows = [row("base", []), *(row(f"q@{n}", ["base"], warnings=["width"] if n else ["other"]) for n in range(30))]
    page = render_report(summary(rows))
    assert "and 23 more</b>: width" in page and page.count(": width") == 1


@pytest.mark.parametrize("count", [3, 100])
def test_a_sweep_of_any_width_reads_well(count: int) -> None:
    grid = [{"q.bits": n} for n in range(count)]
    page = render_report(sweep(grid, lambda v: {"accuracy": v["q.bits"] / 200, "size_mb": 1.0 + v["q.bits"] % 10}))
    read(page)
    found = sections(page)
    assert ("<details>" in found["Every stage"]) == (count > 40) == ("<details>" in found["The sweep"])
    assert len(svgs(found["Where accuracy went"])[0].findall("rect")) == min(count, 8), "of many, the best"


def test_the_best_of_many_are_those_no_other_beats() -> None:
    rows: list[dict[str, Any]] = [row("base", [], metrics={"accuracy": 1.0, "size_mb": 99.0}), row("p", ["base"])]
    rows += [row(f"q@{n}", ["p"], metrics={"accuracy": 0.9 if n == 5 else 0.5, "size_mb": 3.0 if n in (5, 6) else 4.0}) for n in range(50)]
    assert [one["stage"] for one in shown(rows)] == ["base", "p", "q@5"]
    assert len(leaves(rows)) == 50
    assert [one["stage"] for one in with_ancestors(rows, [rows[9]])] == ["base", "p", "q@7"]


def test_how_sane_the_samples_are_stands_below_them() -> None:
    told = {"samples": [{"prompt": "Once", "text": "and and and"}]}
    sane = {"repetition_rate": 0.25, "repetition_rate_low": 0.2, "repetition_rate_high": 0.3, "empty_rate": 0.0, "invalid_utf8_rate": 0.0}
    section = samples_section([row("base", [], metrics=sane, details=told)])
    assert "repeated 4-grams" in section and "0.25<small>0.20–0.30</small>" in section
    assert "repeated" not in samples_section([row("base", [], details=told)]), "a run of before"
