"""The page about several runs side by side. Imports no torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from flows.report.page import pareto_section
from flows.report.rendering import Cell, folded, render, render_page, render_table, state_cell, word_cells
from flows.report.rows import MANY, Row
from flows.report.run_comparison import RunComparison
from flows.report.table import figure_cell
from tasks.measurement.figures import Figure

_CSS = {"better": "better", "worse": "worse", "noise": "dim", "same": "dim", "unlike": "dim"}


def render_comparison(comparison: RunComparison, summaries: Sequence[Mapping[str, Any]]) -> str:
    """Render the page. `summaries` are those that were compared."""
    runs = zip(comparison.names, summaries, strict=True)
    rows = [{**row, "run": name} for name, summary in runs for row in summary["rows"] if row["stage"] in comparison.stages]
    sections = [
        ("What differs", _differences(comparison)),
        ("Every stage", _table(comparison)),
        ("What it bought", pareto_section(rows, group="run")),
    ]
    return render_page(" · ".join(comparison.names), sections)


def _differences(comparison: RunComparison) -> str:
    if not comparison.differences:
        return Markup("<p>Nothing: the same recipe, model, machine and edgepress.</p>")
    rows = [
        [*word_cells([key]), *word_cells(("" if value is None else value for value in values), "wrap")]
        for key, values in comparison.differences.items()
    ]
    return folded(f"{len(rows)} values", render_table(word_cells(("", *comparison.names)), rows), when=len(rows) > MANY)


def _table(comparison: RunComparison) -> Markup:
    heads = [*word_cells(("stage", "run", "state")), *(Cell(figure.heading) for figure in comparison.figures)]
    lines: list[list[Cell]] = []
    row_css = {}
    for stage, rows in comparison.stages.items():
        row_css[len(lines)] = "first"
        for run, row in enumerate(rows):
            names = word_cells((stage if run == 0 else "", comparison.names[run]))
            if row is None:
                lines.append([*names, Cell("not in this run", "words dim", span=1 + len(comparison.figures))])
            else:
                figures = [_figure(comparison, row, run, figure) for figure in comparison.figures]
                lines.append([*names, state_cell(row["state"]), *figures])
    return render_table(heads, lines, row_css) + render("comparison_key", comparison.names[0], comparison.left_out)


def _figure(comparison: RunComparison, row: Row, run: int, figure: Figure) -> Cell:
    change = comparison.change(row["stage"], run, figure)
    marked = (change.marked, _CSS[change.judgement]) if change and change.text else ("", "")
    return figure_cell(row["metrics"], figure, "", *marked)
