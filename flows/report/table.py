"""The report's table: every stage, its figures, and how far their noise reaches. Imports no torch."""

from collections.abc import Sequence
from html import escape

from flows.report.rows import MANY, Row
from flows.report.style import folded, state_class
from tasks.measurement.figures import Figure, Metrics, measured, noise_text


def table_section(rows: Sequence[Row]) -> str:
    """A line for each stage, the base first; only columns that something was measured in. Folded away where it is long."""
    shown = columns(rows)
    heads = "".join(f'<th class="words">{word}</th>' for word in ("stage", "state")) + "<th>s</th>"
    heads += "".join(f'<th class="words">{word}</th>' for word in ("uses", "runtime"))
    heads += "".join(f"<th>{escape(figure.heading)}</th>" for figure in shown)
    lines = "".join(_line(row, shown, "base" if number == 0 else "") for number, row in enumerate(rows))
    note = '<p class="dim">Below a figure: its 95% interval; of speeds from the slowest to the fastest repeat. Times are those of computing.</p>'
    table = f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'
    return folded(f"{len(rows)} stages", table + note, when=len(rows) > MANY)


def columns(rows: Sequence[Row]) -> list[Figure]:
    """What was measured; the standard error has no column of its own, for intervals stand below the figures."""
    return [figure for figure in measured(row["metrics"] for row in rows) if figure.metric != "accuracy_stderr"]


def cell(metrics: Metrics, figure: Figure, extra: str = "", css: str = "") -> str:
    """A figure with its interval; `extra` follows the value, as HTML."""
    interval = noise_text(metrics, figure) if figure.metric in metrics else ""
    small = f"<small>{escape(interval)}</small>" if interval else ""
    return f"<td{f' class={css}' if css else ''}>{figure.text(metrics)}{extra}{small}</td>"


def _line(row: Row, shown: Sequence[Figure], css: str) -> str:
    stage, uses, runtime = (f'<td class="words">{escape(str(row[key] or ""))}</td>' for key in ("stage", "uses", "runtime"))
    figures = "".join(cell(row["metrics"], figure) for figure in shown)
    state = f'<td class="words {state_class(row["state"])}">{escape(row["state"].lower())}</td>'
    seconds = f"<td>{row['seconds']:.1f}</td>"
    return f"<tr{f' class={css}' if css else ''}>{stage}{state}{seconds}{uses}{runtime}{figures}</tr>"
