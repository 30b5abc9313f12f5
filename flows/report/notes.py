"""What a reader must know about a run: failures, warnings, verdicts; and where it ran. Imports no torch."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from flows.report.rendering import Cell, folded, render, render_table, state_class, word_cells
from flows.report.rows import MANY, Row, origin

_MOST_NAMES = 6
_RELATIONS = {"at least": "≥ ", "at most": "≤ "}


def alerts(rows: Sequence[Row]) -> Markup:
    """Render failures, then warnings, for the place right below the title. A message of several stages stands there once."""
    failed = [(row["stage"], row["reason"]) for row in rows if row["state"] in ("Failed", "Stopped")]
    why = "not run, because a stage that it needs failed" if failed else "not run"
    skipped = [(row["stage"], why) for row in rows if row["state"] == "Skipped"]
    warnings = [(row["stage"], text) for row in rows for text in row["warnings"]]
    title = "Failed" if any(row["state"] == "Failed" for row in rows) else "Not finished"
    parts = Markup()
    if failed or skipped:
        parts += render("alert", "alert", "Failed", title, _grouped([*failed, *skipped]))
    return parts + render("alert", "note", "Skipped", "Warnings", _grouped(warnings)) if warnings else parts


def _grouped(messages: Iterable[tuple[str, str]]) -> list[tuple[list[str], int, str]]:
    """Each text with the stages that it is about: the first few names, and how many more."""
    found: dict[str, list[str]] = {}
    for name, text in messages:
        found.setdefault(text, []).append(name)
    return [(names[:_MOST_NAMES], len(names) - _MOST_NAMES, text) for text, names in found.items()]


def gates_section(gates: Sequence[Row]) -> str:
    """Render every verdict with value, limit and interval. Those that are not PASS come first; many that passed are folded."""
    if not gates:
        return ""
    broken = sorted((gate for gate in gates if gate["outcome"] != "PASS"), key=lambda gate: gate["outcome"])
    passed = [gate for gate in gates if gate["outcome"] == "PASS"]
    counts = Counter(gate["outcome"] for gate in (*broken, *passed))
    tally = render("tally", [(count, outcome, state_class(outcome)) for outcome, count in counts.items()])
    if len(gates) <= MANY:
        return tally + _verdicts([*broken, *passed])
    return tally + (_verdicts(broken) if broken else "") + folded(f"{len(passed)} that passed", _verdicts(passed), when=bool(passed))


def _verdicts(gates: Sequence[Row]) -> Markup:
    heads = [*word_cells(("stage", "metric", "outcome")), Cell("value"), Cell("limit"), Cell("interval"), *word_cells([""])]
    return render_table(heads, [_verdict(gate) for gate in gates])


def _verdict(gate: Row) -> list[Cell]:
    value, limit, low, high = (_number(gate.get(key)) for key in ("value", "limit", "low", "high"))
    return [
        *word_cells((gate["stage"], gate["metric"])),
        Cell(gate["outcome"], f"words strong {state_class(gate['outcome'])}"),
        Cell(value),
        Cell(_RELATIONS.get(gate.get("relation") or "", "") + limit),
        Cell(f"{low}–{high}" if low and high else ""),
        *word_cells([gate["message"]], "wrap"),
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def environment_section(environment: Mapping[str, Any]) -> Markup:
    """Render where and with what the run ran."""
    rows = []
    for key, value in environment.items():
        text = ", ".join(f"{k}: {v}" for k, v in value.items() if v is not None) if isinstance(value, dict) else str(value)
        rows.append([*word_cells([key]), *word_cells([text], "wrap")])
    return render_table([], rows)


def outcome(rows: Sequence[Row]) -> Markup:
    """Render how the run ended, in a line: how many stages were computed, found in the store, failed."""
    stages = rows[1:]
    counts = {state: sum(row["state"] == state for row in stages) for state in ("Completed", "Cached", "Failed", "Stopped", "Skipped")}
    names = len({origin(row["stage"]) for row in stages})
    copies = f" ({names} in the recipe)" if names < len(stages) else ""
    return render("tally", [(count, state.lower(), state) for state, count in counts.items() if count], f"{len(stages)} stages{copies}: ")
