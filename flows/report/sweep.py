"""The report's section about a sweep: its cells as a table, and each metric over the swept values. Imports no torch."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from markupsafe import Markup

from flows.report.charts import COLOURS, Point, lines
from flows.report.comparison import Comparison, Line, compare
from flows.report.rendering import Cell, folded, render, render_legend, render_plots, render_table, state_cell, word_cells
from flows.report.rows import MANY
from flows.report.table import figure_cell
from tasks.measurement.figures import Metrics, noise

_DRAWN = (
    ("accuracy", "accuracy"),
    ("perplexity", "perplexity"),
    ("size_mb", "size on disk (MB)"),
    ("tokens_per_second", "decode tokens/s"),
)
_SEED, _OWN = "seed", "(recipe)"


def sweep_section(summary: dict[str, Any]) -> str:
    """Render the sweep; empty for a recipe without a matrix."""
    if not summary["sweep"]:
        return ""
    found = compare(summary)
    base = summary["rows"][0]["metrics"]
    return Markup().join(_plots(found, leaf, base) for leaf in found.leaves) + _table(found)


def _table(found: Comparison) -> str:
    figures = [figure for figure in found.measured() if figure.better]
    several = len(found.leaves) > 1
    heads = word_cells((*found.keys, *(["result"] if several else [])))
    heads += [*(Cell(figure.heading) for figure in figures), *word_cells(["state"])]
    rows = []
    for line in found.lines:
        places = word_cells((*line.values, *([line.leaf] if several else [])))
        measured = [figure_cell(line.row["metrics"], figure, "best" if figure.metric in line.best else "") for figure in figures]
        rows.append([*places, *measured, state_cell(line.row["state"])])
    return folded(f"{len(rows)} results", render_table(heads, rows), when=len(rows) > MANY)


def _plots(found: Comparison, leaf: str, base: dict[str, float]) -> Markup:
    """Render a chart of each metric: along x the key with the most values, a line for each choice of the others; seeds are averaged.

    Where these are too many lines to tell apart, each key has charts of its own, of means over all the others.
    """
    cells = [line for line in found.lines if line.leaf == leaf]
    keys = [n for n, key in enumerate(found.keys) if key != _SEED] or [0]
    along = max(keys, key=lambda n: len({line.values[n] for line in cells}))
    together = [n for n in keys if n != along and _decided_by(cells, along, n)]
    others = [n for n in keys if n != along and n not in together]
    names = {line.values: ", ".join(f"{found.keys[n]} {line.values[n] or _OWN}" for n in others) for line in cells}
    title = Markup("<h3>{}</h3>").format(leaf) if len(found.leaves) > 1 else Markup()
    if len(set(names.values())) > len(COLOURS):
        charts = [chart for n in keys if n not in together for chart in _charts(found, cells, [n], dict.fromkeys(names, ""), base, 2)]
        note = "Means over all other values; whiskers reach from the smallest to the largest." if charts else ""
        return title + render_plots(charts) + render("note", note)
    charts = _charts(found, cells, [along, *together], names, base, len(_DRAWN))
    note = "Whiskers reach as far as the noise of the measurement, where it is known: 95%."
    if len(keys) < len(found.keys):
        note = "Means over the seeds; whiskers reach from the smallest to the largest."
    return title + render_legend(names.values()) + render_plots(charts) + render("note", note) if charts else Markup()


def _charts(
    found: Comparison, cells: Sequence[Line], along: Sequence[int], names: Mapping[tuple[str, ...], str], base: Metrics, most: int
) -> list[tuple[str, str, str]]:
    """Charts of the first metrics that were measured, at most so many, over the first key of `along`; the others go with it."""
    ticks = _sorted(list(dict.fromkeys(line.values[along[0]] for line in cells)))
    place = {text: number for number, text in enumerate(ticks)}
    x_label = ", ".join(found.keys[n] for n in along)
    charts: list[tuple[str, str, str]] = []
    for metric, label in _DRAWN:
        groups: dict[str, dict[int, list[Line]]] = {name: {} for name in dict.fromkeys(names.values())}
        for line in cells:
            if metric in line.row["metrics"]:
                groups[names[line.values]].setdefault(place[line.values[along[0]]], []).append(line)
        series = {name: [_point(x, there, metric) for x, there in sorted(points.items())] for name, points in groups.items()}
        if sum(map(len, series.values())) > 1:
            svg = lines(series, [tick or _OWN for tick in ticks], x_label, label, base.get(metric), share=metric == "accuracy")
            charts.append(("", svg, ""))
    return charts[:most]


def _decided_by(cells: Sequence[Line], key: int, other: int) -> bool:
    """Whether `other` has one value for each of `key`, as keys have that go side by side."""
    return len({(line.values[key], line.values[other]) for line in cells}) == len({line.values[key] for line in cells})


def _point(x: int, there: Sequence[Line], metric: str) -> Point:
    values = [line.row["metrics"][metric] for line in there]
    mean = fmean(values)
    reach = (noise(there[0].row["metrics"], metric) if len(there) == 1 else None) or (min(values), max(values))
    title = f"{there[0].row['stage']}: {metric} {mean:.4g}" + (f", mean of {len(there)}" if len(there) > 1 else "")
    return Point(x, mean, reach[0], reach[1], title)


def _sorted(texts: list[str]) -> list[str]:
    """By size where all are numbers, else as they come."""
    try:
        return sorted(texts, key=float)
    except ValueError:
        return texts
