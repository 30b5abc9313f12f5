"""The report's section about a sweep: its cells as a table, and each metric over the swept values. Imports no torch."""

from collections.abc import Sequence
from html import escape
from statistics import fmean
from typing import Any

from flows.charts import Point, legend, lines
from flows.comparison import Comparison, Line, compare
from flows.screen import COLUMNS

_DRAWN = (
    ("accuracy", "accuracy"),
    ("perplexity", "perplexity"),
    ("size_mb", "size on disk (MB)"),
    ("tokens_per_second", "decode tokens/s"),
)
_SEED, _OWN = "seed", "(recipe)"


def sweep_section(summary: dict[str, Any]) -> str:
    """HTML; empty for a recipe without a matrix."""
    if not summary["sweep"]:
        return ""
    found = compare(summary)
    base = summary["rows"][0]["metrics"]
    return "".join(_plots(found, leaf, base) for leaf in found.leaves) + f'<div class="scroll">{_table(found)}</div>'


def _table(found: Comparison) -> str:
    shown = [column for column in COLUMNS if found.measured(column[0])]
    leaf = ["result"] if len(found.leaves) > 1 else []
    heads = "".join(f'<th class="words">{escape(key)}</th>' for key in (*found.keys, *leaf))
    heads += "".join(f"<th>{escape(heading)}</th>" for _, heading, _ in shown) + '<th class="words">state</th>'
    body = []
    for line in found.lines:
        words = "".join(f'<td class="words">{escape(text)}</td>' for text in (*line.values, *([line.leaf] if leaf else [])))
        figures = "".join(
            f"<td{' class=best' if metric in line.best else ''}>{_figure(line, metric, form)}</td>" for metric, _, form in shown
        )
        state = escape(line.row["state"])
        body.append(f'<tr>{words}{figures}<td class="words {state}">{state.lower()}</td></tr>')
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _figure(line: Line, metric: str, form: str) -> str:
    return form.format(line.row["metrics"][metric]) if metric in line.row["metrics"] else ""


def _plots(found: Comparison, leaf: str, base: dict[str, float]) -> str:
    """A chart of each metric: along x the key with the most values, a line for each choice of the others; seeds are averaged."""
    cells = [line for line in found.lines if line.leaf == leaf]
    keys = [n for n, key in enumerate(found.keys) if key != _SEED] or [0]
    along = max(keys, key=lambda n: len({line.values[n] for line in cells}))
    together = [n for n in keys if n != along and _decided_by(cells, along, n)]
    others = [n for n in keys if n != along and n not in together]
    ticks = _sorted(list(dict.fromkeys(line.values[along] for line in cells)))
    place = {text: number for number, text in enumerate(ticks)}
    x_label = ", ".join(found.keys[n] for n in (along, *together))
    names = {line.values: ", ".join(f"{found.keys[n]} {line.values[n] or _OWN}" for n in others) for line in cells}
    charts = []
    for metric, label in _DRAWN:
        groups: dict[str, dict[int, list[Line]]] = {name: {} for name in dict.fromkeys(names.values())}
        for line in cells:
            if metric in line.row["metrics"]:
                groups[names[line.values]].setdefault(place[line.values[along]], []).append(line)
        series = {name: [_point(x, there, metric) for x, there in sorted(points.items())] for name, points in groups.items()}
        if sum(map(len, series.values())) > 1:
            charts.append(lines(series, [tick or _OWN for tick in ticks], x_label, label, base.get(metric)))
    if not charts:
        return ""
    title = f"<h3>{escape(leaf)}</h3>" if len(found.leaves) > 1 else ""
    repeated = "Means over the seeds; whiskers reach from the smallest to the largest." if len(keys) < len(found.keys) else ""
    stderr = "" if repeated else "Whiskers of accuracy are one standard error."
    note = f'<p class="dim">{repeated}{stderr}</p>'
    return f'{title}{legend(list(dict.fromkeys(names.values())))}<div class="plots">{"".join(charts)}</div>{note}'


def _decided_by(cells: Sequence[Line], key: int, other: int) -> bool:
    """Whether `other` has one value for each of `key`, as keys have that go side by side."""
    return len({(line.values[key], line.values[other]) for line in cells}) == len({line.values[key] for line in cells})


def _point(x: int, there: Sequence[Line], metric: str) -> Point:
    values = [line.row["metrics"][metric] for line in there]
    mean = fmean(values)
    spread = there[0].row["metrics"].get("accuracy_stderr", 0.0) if metric == "accuracy" and len(there) == 1 else 0.0
    title = f"{there[0].row['stage']}: {metric} {mean:.4g}" + (f", mean of {len(there)}" if len(there) > 1 else "")
    return Point(x, mean, min(*values, mean - spread), max(*values, mean + spread), title)


def _sorted(texts: list[str]) -> list[str]:
    """By size where all are numbers, else as they come."""
    try:
        return sorted(texts, key=float)
    except ValueError:
        return texts
