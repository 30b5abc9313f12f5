"""What a person must know about a run: failures, warnings, verdicts; and where it ran. Imports no torch."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from flows.report.rows import MANY, Row, origin
from flows.report.style import folded, state_class

_MOST_NAMES = 6


def alerts(rows: Sequence[Row]) -> str:
    """Failures, then warnings: right below the title. What several stages say alike stands there once."""
    failed = [(row["stage"], row["reason"]) for row in rows if row["state"] in ("Failed", "Stopped")]
    left_out = [row["stage"] for row in rows if row["state"] == "Skipped"]
    warned = [(row["stage"], text) for row in rows for text in row["warnings"]]
    lines = [_item(names, text) for text, names in _grouped(failed)]
    if left_out:
        lines.append(_item(left_out, "not run, for what they need is not there" if failed else "not run"))
    kind = "Failed" if any(row["state"] == "Failed" for row in rows) else "Not finished"
    parts = f'<div class="alert"><b class="Failed">{kind}</b>{_listed(lines)}</div>' if lines else ""
    warnings = [_item(names, text) for text, names in _grouped(warned)]
    if warnings:
        parts += f'<div class="note"><b class="Skipped">Warnings</b>{_listed(warnings)}</div>'
    return parts


def _grouped(told: Iterable[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    found: dict[str, list[str]] = {}
    for name, text in told:
        found.setdefault(text, []).append(name)
    return list(found.items())


def _item(names: Sequence[str], text: str) -> str:
    more = len(names) - _MOST_NAMES
    shown = ", ".join(map(escape, names[:_MOST_NAMES])) + (f" and {more} more" if more > 0 else "")
    return f"<li><b>{shown}</b>: {escape(text)}</li>"


def _listed(lines: Sequence[str]) -> str:
    few, many = lines[:8], lines[8:]
    more = folded(f"{len(many)} more", f"<ul>{''.join(many)}</ul>", when=True) if many else ""
    return f"<ul>{''.join(few)}</ul>{more}"


def gates_section(gates: Sequence[Row]) -> str:
    """Every verdict: what was measured, the limit, how far noise reaches. Those that are not PASS come first; many that are are folded away."""
    if not gates:
        return ""
    broken = sorted((gate for gate in gates if gate["outcome"] != "PASS"), key=lambda gate: gate["outcome"])
    passed = [gate for gate in gates if gate["outcome"] == "PASS"]
    counts = Counter(gate["outcome"] for gate in (*broken, *passed))
    told = ", ".join(f'<span class="{state_class(outcome)}">{count} {outcome}</span>' for outcome, count in counts.items())
    if len(gates) <= MANY:
        return f"<p>{told}</p>{_verdicts([*broken, *passed])}"
    return f"<p>{told}</p>{_verdicts(broken)}{folded(f'{len(passed)} that passed', _verdicts(passed), when=True)}"


def _verdicts(gates: Sequence[Row]) -> str:
    words = "".join(f'<th class="words">{word}</th>' for word in ("stage", "metric", "outcome"))
    heads = f'{words}<th>value</th><th>limit</th><th>interval</th><th class="words"></th>'
    lines = []
    for gate in gates:
        words = "".join(f'<td class="words">{escape(gate[key])}</td>' for key in ("stage", "metric"))
        outcome = f'<td class="words {state_class(gate["outcome"])}"><b>{escape(gate["outcome"])}</b></td>'
        value, limit, low, high = (_number(gate.get(key)) for key in ("value", "limit", "low", "high"))
        limit = {"at least": "≥ ", "at most": "≤ "}.get(gate.get("relation") or "", "") + limit
        interval = f"{low}–{high}" if low and high else ""
        figures = f"<td>{value}</td><td>{limit}</td><td>{interval}</td>"
        lines.append(f'<tr>{words}{outcome}{figures}<td class="words wrap">{escape(gate["message"])}</td></tr>')
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="scroll">{table}</div>' if lines else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def environment_section(environment: Mapping[str, Any]) -> str:
    """Where and with what it ran."""
    lines = []
    for key, value in environment.items():
        text = ", ".join(f"{k}: {v}" for k, v in value.items() if v is not None) if isinstance(value, dict) else str(value)
        lines.append(f'<tr><td class="words">{escape(key)}</td><td class="words wrap">{escape(text)}</td></tr>')
    return f"<table><tbody>{''.join(lines)}</tbody></table>"


def outcome(rows: Sequence[Row]) -> str:
    """How the run ended, in a line: what was computed, what was there already, what failed."""
    stages = rows[1:]
    counts = {state: sum(row["state"] == state for row in stages) for state in ("Completed", "Cached", "Failed", "Stopped", "Skipped")}
    told = ", ".join(f'<span class="{state}">{count} {state.lower()}</span>' for state, count in counts.items() if count)
    names = len({origin(row["stage"]) for row in stages})
    copies = f" ({names} in the recipe)" if names < len(stages) else ""
    return f"{len(stages)} stages{copies}: {told}"
