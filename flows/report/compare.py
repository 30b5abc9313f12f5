"""The page about several runs side by side. Imports no torch."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from flows.report.page import pareto_section
from flows.report.rows import MANY
from flows.report.run_comparison import RunComparison
from flows.report.style import folded, state_class, whole_page
from flows.report.table import cell

_CSS = {"better": "better", "worse": "worse", "noise": "dim", "same": "dim", "unlike": "dim"}


def render_comparison(found: RunComparison, summaries: Sequence[Mapping[str, Any]]) -> str:
    """The page as text. `summaries` are those that were compared."""
    title = " · ".join(found.names)
    rows = [{**row, "run": name} for name, summary in zip(found.names, summaries, strict=True) for row in summary["rows"]]
    sections = [
        ("What differs", _differences(found)),
        ("Every stage", _table(found)),
        ("What it bought", pareto_section([row for row in rows if row["stage"] in found.stages], group="run")),
    ]
    body = "".join(f"<section><h2>{heading}</h2>{content}</section>" for heading, content in sections if content)
    return whole_page(title, f"<h1>{escape(title)}</h1>{body}")


def _differences(found: RunComparison) -> str:
    if not found.differences:
        return "<p>Nothing: the same recipe, model, machine and edgepress.</p>"
    heads = "".join(f'<th class="words">{escape(text)}</th>' for text in ("", *found.names))
    lines = []
    for key, values in found.differences.items():
        texts = "".join(f'<td class="words wrap">{"" if value is None else escape(str(value))}</td>' for value in values)
        lines.append(f'<tr><td class="words">{escape(key)}</td>{texts}</tr>')
    table = f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    return folded(f"{len(lines)} values", table, when=len(lines) > MANY)


def _table(found: RunComparison) -> str:
    heads = "".join(f'<th class="words">{word}</th>' for word in ("stage", "run", "state"))
    heads += "".join(f"<th>{escape(figure.heading)}</th>" for figure in found.figures)
    lines = []
    for stage, rows in found.stages.items():
        for number, row in enumerate(rows):
            words = [stage if number == 0 else "", found.names[number]]
            named = "".join(f'<td class="words">{escape(word)}</td>' for word in words)
            if row is None:
                lines.append(f'<tr>{named}<td class="words dim" colspan="{1 + len(found.figures)}">not in this run</td></tr>')
                continue
            figures = []
            for figure in found.figures:
                change = found.change(stage, number, figure)
                extra = f' <span class="{_CSS[change.judgement]}">{change.marked}</span>' if change and change.text else ""
                figures.append(cell(row["metrics"], figure, extra))
            state = f'<td class="words {state_class(row["state"])}">{escape(row["state"].lower())}</td>'
            lines.append(f"<tr{' class=first' if number == 0 else ''}>{named}{state}{''.join(figures)}</tr>")
    left_out = f" {found.left_out} stages that others follow are left out." if found.left_out else ""
    note = (
        f'<p class="dim">Differences from {escape(found.names[0])}: <span class="better">better ✓</span>, <span class="worse">worse ✗</span>, '
        f"grey where it is within the noise of both (~), or was measured with other data or settings, or on another machine (?).{left_out}</p>"
    )
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>{note}'
