"""One self-contained HTML page about a run: the graph, the table, quality against size and speed, what to know. Imports no torch."""

import time
from collections.abc import Sequence
from html import escape
from typing import Any

from flows.screen import COLUMNS

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
.plots { display: flex; flex-wrap: wrap; gap: 1.5rem } .plots svg { flex: 1 1 26rem; background: var(--card); border-radius: 8px }
li { margin: .3rem 0 }
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
        boxes.append(
            f"<g><title>{escape(row['uses'])}: {state}</title>"
            f'<rect x="{x}" y="{y}" width="165" height="50" rx="8" fill="var(--card)" class="{state}" stroke-width="2"/>'
            f'<text x="{x + 10}" y="{y + 21}" font-weight="600">{escape(_short(row["stage"], 22))}</text>'
            f'<text x="{x + 10}" y="{y + 39}" class="dim" stroke="none">{state.lower()} · {row["seconds"]:.1f} s</text></g>'
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
    width, height, left, right, top, bottom = 560, 340, 58, 20, 24, 44
    xs, ys = _axis([p[0] for p in points], zero=True), _axis([p[1] for p in points], zero=False)

    def px(x: float) -> float:
        return left + (x - xs[0]) / (xs[-1] - xs[0]) * (width - left - right)

    def py(y: float) -> float:
        return height - bottom - (y - ys[0]) / (ys[-1] - ys[0]) * (height - top - bottom)

    parts = []
    for x in xs:
        parts.append(f'<text x="{px(x):.1f}" y="{height - bottom + 18}" text-anchor="middle" class="dim">{x:g}</text>')
    for y in ys:
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{py(y):.1f}" y2="{py(y):.1f}" stroke="var(--line)"/>')
        parts.append(f'<text x="{left - 8}" y="{py(y) + 4:.1f}" text-anchor="end" class="dim">{y:g}</text>')
    parts.append(f'<text x="{(left + width - right) / 2}" y="{height - 8}" text-anchor="middle">{label}</text>')
    parts.append(f'<text x="{left}" y="15">{quality}</text>')
    taken: list[tuple[float, float]] = []
    for x, y, stage in sorted(points, key=lambda p: py(p[1])):
        across, down = px(x), py(y)
        fill = "none" if stage == rows[0]["stage"] else "var(--mark)"
        parts.append(f'<circle cx="{across:.1f}" cy="{down:.1f}" r="5" fill="{fill}" stroke="var(--mark)" stroke-width="2"><title>')
        parts.append(f"{escape(stage)}: {quality} {y:.4g}, {label} {x:.4g}</title></circle>")
        at = down + 4
        while any(abs(across - a) < 110 and abs(at - d) < 13 for a, d in taken):
            at += 13  # labels of neighbours one below the other
        taken.append((across, at))
        flip = across > width - 140
        anchor = f'x="{across - 10:.1f}" text-anchor="end"' if flip else f'x="{across + 10:.1f}"'
        parts.append(f'<text {anchor} y="{at:.1f}">{escape(_short(stage, 18))}</text>')
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{quality} against {label}">{"".join(parts)}</svg>'


def _axis(values: Sequence[float], *, zero: bool) -> list[float]:
    """Round numbers that enclose the values, about five of them."""
    low, high = (0.0 if zero else min(values)), max(values)
    span = (high - low) or abs(high) or 1.0
    raw = span / 4
    power = 10.0 ** (len(f"{int(raw)}") - 1) if raw >= 1 else 10.0 ** -(next(i for i in range(1, 20) if raw * 10**i >= 1))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    first, last = int(low // step), int(-(-high // step))
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


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


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
