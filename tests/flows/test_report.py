import re
from html.parser import HTMLParser
from xml.etree import ElementTree

from flows.report import render_report

VOID = {"meta"}


def row(stage: str, needs: list[str], state: str = "Completed", metrics: dict | None = None, **more: object) -> dict:
    return {
        "stage": stage, "uses": "kind", "needs": needs, "state": state, "seconds": 1.5, "runtime": "transformers",
        "metrics": metrics or {}, "warnings": [], "reason": None, **more,
    }  # fmt: skip


SUMMARY = {
    "recipe": {}, "name": "demo <1>", "started": 0.0, "seconds": 61.0,
    "rows": [
        row("base", [], metrics={"accuracy": 0.9, "perplexity": 4.0, "size_mb": 9.0, "tokens_per_second": 100.0, "parameters": 4e6}),
        row("prune", ["base"], "Cached", {"accuracy": 0.5, "size_mb": 6.0, "tokens_per_second": 140.0}, warnings=["width 96 & K-quants"]),
        row("gguf", ["prune"], metrics={"accuracy": 0.49, "size_mb": 2.0}),
        row("onnx", ["prune"], "Failed", reason="<boom>"),
        row("later", ["onnx"], "Skipped", reason="onnx failed"),
    ],
    "sweep": None,
    "gates": [{"stage": "prune", "metric": "accuracy", "outcome": "FAIL", "message": "accuracy 0.5 < 0.6"}],
    "environment": {"edgepress": "0.1", "threads": 2, "base": {"source": "models/x", "revision": None}},
}  # fmt: skip


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


def test_the_page_stands_alone_and_says_everything() -> None:
    page = render_report(SUMMARY)
    reader = Reader()
    reader.feed(page)
    assert (reader.open, reader.links) == ([], [])
    assert not re.search(r"url\(|@import|https?://|<script", page)
    assert "prefers-color-scheme: dark" in page
    for text in ("demo <1>", "<boom>", "width 96 & K-quants", "accuracy 0.5 < 0.6", "onnx failed", "0.900", "4.00", "cached", "models/x"):
        assert text in reader.words
    graph, *plots = (ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page))
    assert len(graph.findall(".//rect")) == 5
    assert len(graph.findall("path")) == 4
    assert [len(plot.findall("circle")) for plot in plots] == [3, 2]
    assert page == render_report(SUMMARY)


def test_a_run_without_figures_has_a_page_too() -> None:
    page = render_report({**SUMMARY, "rows": [row("base", [])], "gates": []})
    assert page.count("<svg") == 1
    assert "What it bought" not in page
    assert "Gates" not in page
