"""The report's table: every stage, its figures, and how far their noise reaches. Imports no torch."""

from collections.abc import Sequence

from flows.report.rendering import Cell, folded, render, render_table, state_cell, word_cells
from flows.report.rows import MANY, Row
from tasks.measurement.figures import Figure, Metrics, measured, noise_text

_NOTE = "Below a figure: its 95% interval; of speeds from the slowest to the fastest repeat. Times are those of computing."


def table_section(rows: Sequence[Row]) -> str:
    """Render a line for each stage, the base first; only columns that something was measured in. Folded where it is long."""
    figures = measured_columns(rows)
    heads = [*word_cells(("stage", "state")), Cell("s"), *word_cells(("uses", "runtime")), *(Cell(figure.heading) for figure in figures)]
    table = render_table(heads, [_line(row, figures) for row in rows], {0: "base"})
    return folded(f"{len(rows)} stages", table + render("note", _NOTE), when=len(rows) > MANY)


def measured_columns(rows: Sequence[Row]) -> list[Figure]:
    """What was measured; the standard error has no column, because intervals stand below the figures."""
    return [figure for figure in measured(row["metrics"] for row in rows) if figure.metric != "accuracy_stderr"]


def figure_cell(metrics: Metrics, figure: Figure, css: str = "", change: str = "", change_css: str = "") -> Cell:
    """A figure with its interval; `change` follows the value."""
    interval = noise_text(metrics, figure) if figure.metric in metrics else ""
    return Cell(figure.text(metrics), css, interval, change, change_css)


def _line(row: Row, figures: Sequence[Figure]) -> list[Cell]:
    stage, uses, runtime = word_cells(row[key] or "" for key in ("stage", "uses", "runtime"))
    cells = [figure_cell(row["metrics"], figure) for figure in figures]
    return [stage, state_cell(row["state"]), Cell(f"{row['seconds']:.1f}"), uses, runtime, *cells]
