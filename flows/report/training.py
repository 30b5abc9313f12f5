"""The report's training curves, by loss term. Imports no torch."""

from collections.abc import Sequence

from markupsafe import Markup

from flows.report.charts import curves
from flows.report.rendering import render_legend, render_plots
from flows.report.rows import Row, origin

_MOST_POINTS = 300
Curve = list[tuple[float, float]]


def training_section(rows: Sequence[Row]) -> Markup:
    """Render a chart for each stage that trained, a line for each of its losses; the copies of a sweep's stage are lines of one chart."""
    charts: list[tuple[str, dict[str, Curve]]] = []
    for name in dict.fromkeys(origin(row["stage"]) for row in rows):
        copies = {row["stage"]: _losses(row) for row in rows if origin(row["stage"]) == name}
        trained = {stage: terms for stage, terms in copies.items() if terms}
        if len(trained) == 1:
            series = next(iter(trained.values()))
            charts.append((name, series))
        elif trained:
            for term in dict.fromkeys(term for terms in trained.values() for term in terms):
                series = {stage.partition("@")[2] or stage: terms[term] for stage, terms in trained.items() if term in terms}
                charts.append((f"{name}: {term}", series))
    return render_plots([(caption, curves(series, "step", "loss"), render_legend(series)) for caption, series in charts])


def _losses(row: Row) -> dict[str, Curve]:
    """Points (step, value) by loss term. A total of a single term is that term, and not drawn a second time."""
    found: dict[str, Curve] = {}
    for step, values in row.get("curves", ()):
        for term, value in values.items():
            if "loss" in term:
                found.setdefault(term, []).append((float(step), value))
    terms = [term for term in found if term.startswith("loss_")]
    if len(terms) == 1 and found.get("loss") == found[terms[0]]:
        del found["loss"]
    return {term: _thinned(points) for term, points in found.items() if len(points) > 1}


def _thinned(points: Curve) -> Curve:
    """At most so many points as a chart can show; first and last stay."""
    every = -(-len(points) // _MOST_POINTS)
    return points if every == 1 else [*points[:-1:every], points[-1]]
