"""One self-contained HTML page about a run: the graph, the table, quality against size and speed, what to know. Imports no torch."""

import time
from html import escape
from typing import Any

from flows.charts import scatter, shortened
from flows.screen import COLUMNS
from flows.sweep_report import sweep_section

Row = dict[str, Any]

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --dim: #667085; --line: #d5dae1; --paper: #fff; --card: #f6f7f9; --mark: #2563eb;
  --Completed: #15803d; --Cached: #0e7490; --Failed: #b91c1c; --Skipped: #a16207; --Running: #667085; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --dim: #98a2b3; --line: #384150; --paper: #12161c; --card: #1b212a;
  --mark: #7aa7ff; --Completed: #4ade80; --Cached: #38bdf8; --Failed: #f87171; --Skipped: #facc15; --Running: #98a2b3; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 78rem; margin: 2rem auto; padding: 0 1rem }
h1 { margin: 0 } h2 { margin: 2.2rem 0 .6rem; font-size: 1.15rem } .dim { color: var(--dim) } .scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums } th { font-weight: 600; color: var(--dim) }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
.words { text-align: left } tr.base { background: var(--card) } .wrap { white-space: normal }
svg { display: block; max-width: 100%; height: auto }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink) } svg .dim { fill: var(--dim) }
.plots { display: flex; flex-wrap: wrap; gap: 1.5rem } .plots svg { flex: 1 1 26rem; max-width: 38rem; background: var(--card); border-radius: 8px }
li { margin: .3rem 0 } .best { color: var(--Completed); font-weight: 700 }
""" + "".join(
    f".{s} {{ color: var(--{s}) }} svg .{s} {{ stroke: var(--{s}) }}\n" for s in ("Completed", "Cached", "Failed", "Skipped", "Running")
)


def render_report(summary: dict[str, Any]) -> str:
    """The page as text. `summary` is what flows/pipeline.py writes into run.json: rows in topological order, the base first."""
    rows: list[Row] = summary["rows"]
    base = summary["environment"].get("base", {})
    origin = " · ".join(str(base[k]) for k in ("source", "revision", "license") if base.get(k))
    started = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(summary["started"]))
    head = f'<h1>{escape(summary["name"])}</h1><p class="dim">{started} · {summary["seconds"]:.0f} s · {escape(origin)}</p>'
    plots = _plot(rows, "size_mb", "size on disk (MB)") + _plot(rows, "tokens_per_second", "decode tokens/s")
    sections = [
        ("The sweep", sweep_section(summary)),
        ("The graph", f'<div class="scroll">{_graph(rows)}</div>'),
        ("Every stage", f'<div class="scroll">{_table(rows)}</div>'),
        ("What it bought", f'<div class="plots">{plots}</div>' if plots else ""),
        ("To know", _notes(rows)),
        ("Gates and proofs", _gates(summary["gates"])),
        ("Environment", _environment(summary["environment"])),
    ]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections if content)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(summary['name'])} · edgepress</title><style>{_STYLE}</style></head><body>{head}{body}</body></html>\n"
    )


def _graph(rows: list[Row]) -> str:
    """Boxes in columns by depth, with a line from each stage to those that need it."""
    depth: dict[str, int] = {}
    place: dict[str, tuple[int, int]] = {}
    filled: dict[int, int] = {}
    for row in rows:
        column = depth[row["stage"]] = max((depth[n] + 1 for n in row["needs"] if n in depth), default=0)
        place[row["stage"]] = (10 + column * 205, 10 + filled.get(column, 0) * 66)
        filled[column] = filled.get(column, 0) + 1
    width, height = 205 * (max(filled) + 1), 66 * max(filled.values()) + 10
    lines, boxes = [], []
    for row in rows:
        x, y = place[row["stage"]]
        for need in (n for n in row["needs"] if n in place):
            fx, fy = place[need][0] + 165, place[need][1] + 25
            path = f"M{fx},{fy} C{fx + 20},{fy} {x - 20},{y + 25} {x},{y + 25}"
            lines.append(f'<path d="{path}" fill="none" stroke="var(--line)" stroke-width="1.5"/>')
        state = escape(row["state"])
        name, _, swept = row["stage"].partition("@")
        below = shortened(swept, 25) if swept else f"{state.lower()} · {row['seconds']:.1f} s"
        boxes.append(
            f"<g><title>{escape(row['stage'])}, {escape(row['uses'])}: {state}</title>"
            f'<rect x="{x}" y="{y}" width="165" height="50" rx="8" fill="var(--card)" class="{state}" stroke-width="2"/>'
            f'<text x="{x + 10}" y="{y + 21}" font-weight="600">{escape(shortened(name, 22))}</text>'
            f'<text x="{x + 10}" y="{y + 39}" class="dim" stroke="none">{escape(below)}</text></g>'
        )
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="The stages">{"".join(lines + boxes)}</svg>'


def _table(rows: list[Row]) -> str:
    shown = [c for c in COLUMNS if any(c[0] in row["metrics"] for row in rows)]
    heads = "".join(f"<th>{escape(heading)}</th>" for _, heading, _ in shown)
    lines = []
    for number, row in enumerate(rows):
        cells = "".join(f"<td>{_figure(row['metrics'], metric, form)}</td>" for metric, _, form in shown)
        words = "".join(f'<td class="words">{escape(str(row[key] or ""))}</td>' for key in ("stage", "uses", "runtime"))
        state = f'<td class="words {escape(row["state"])}">{escape(row["state"].lower())}</td>'
        lines.append(f"<tr{' class=base' if number == 0 else ''}>{words}{cells}<td>{row['seconds']:.1f}</td>{state}</tr>")
    words = "".join(f'<th class="words">{w}</th>' for w in ("stage", "uses", "runtime"))
    return f'<table><thead><tr>{words}{heads}<th>s</th><th class="words">state</th></tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _figure(metrics: dict[str, float], metric: str, form: str) -> str:
    return form.format(metrics[metric] / (1e6 if metric == "parameters" else 1)) if metric in metrics else ""


def _plot(rows: list[Row], metric: str, label: str) -> str:
    """Accuracy (perplexity where none was measured) against a cost; the base is a ring. Empty with fewer than two points."""
    quality = "accuracy" if any("accuracy" in row["metrics"] for row in rows) else "perplexity"
    points = [(r["metrics"][metric], r["metrics"][quality], r["stage"]) for r in rows if metric in r["metrics"] and quality in r["metrics"]]
    if len(points) < 2:
        return ""
    return scatter(points, label, quality, ring=rows[0]["stage"])


def _notes(rows: list[Row]) -> str:
    items = []
    for row in rows:
        items += [f"<li><b>{escape(row['stage'])}</b>: {escape(w)}</li>" for w in row["warnings"]]
        if row.get("reason"):
            state = f'<span class="{escape(row["state"])}">{escape(row["state"].lower())}</span>'
            items.append(f"<li><b>{escape(row['stage'])}</b> {state}: {escape(row['reason'])}</li>")
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _gates(gates: list[Row]) -> str:
    colour = {"PASS": "Completed", "FAIL": "Failed"}
    lines = []
    for gate in gates:
        outcome = f'<td class="words {colour.get(gate["outcome"], "Skipped")}">{escape(gate["outcome"])}</td>'
        lines.append(
            f'<tr><td class="words">{escape(gate["stage"])}</td>{outcome}<td class="words wrap">{escape(gate["message"])}</td></tr>'
        )
    return f"<table><tbody>{''.join(lines)}</tbody></table>" if lines else ""


def _environment(environment: dict[str, Any]) -> str:
    lines = []
    for key, value in environment.items():
        text = ", ".join(f"{k}: {v}" for k, v in value.items() if v is not None) if isinstance(value, dict) else str(value)
        lines.append(f'<tr><td class="words">{escape(key)}</td><td class="words wrap">{escape(text)}</td></tr>')
    return f"<table><tbody>{''.join(lines)}</tbody></table>"
