"""The page about one run: what to know first, then the pictures, then every figure. Imports no torch."""

import time
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from flows.report.charts import scatter
from flows.report.graph import graph_section
from flows.report.layers import layers_section
from flows.report.notes import alerts, environment_section, gates_section, outcome
from flows.report.rendering import render, render_legend, render_page, render_plots
from flows.report.rows import MANY, Row, dots, leaves, quality, values
from flows.report.samples import samples_section
from flows.report.study_page import study_section
from flows.report.sweep import sweep_section
from flows.report.table import table_section
from flows.report.training import training_section
from flows.report.waterfall import waterfall_section


def render_report(summary: dict[str, Any]) -> str:
    """Render the page of a run. `summary` is what flows/run/pipeline.py writes into run.json: rows in topological order, the base first."""
    rows: list[Row] = summary["rows"]
    base = summary["environment"]["base"]
    origin = " · ".join(str(base[key]) for key in ("source", "revision", "license") if base[key])
    started = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(summary["started"]))
    facts = render("note", f"{summary['journal']} · {started} · {summary['seconds']:.0f} s · {origin}")
    sections = [
        ("The study", study_section(summary)),
        ("The sweep", sweep_section(summary)),
        ("The graph", graph_section(rows)),
        ("Every stage", table_section(rows)),
        ("What it bought", pareto_section(rows)),
        (f"Where {quality(rows).heading} went", waterfall_section(rows)),
        ("Gates and proofs", gates_section(summary["gates"])),
        ("Training", training_section(rows)),
        ("What it says", samples_section(rows)),
        ("Layers", layers_section(rows)),
        ("Environment", environment_section(summary["environment"])),
    ]
    return render_page(summary["name"], sections, facts + outcome(rows) + alerts(rows))


def pareto_section(rows: Sequence[Row], *, group: str = "runtime") -> Markup:
    """Render quality against size and against speed. Of very many stages only the leaves are dots, and the base."""
    few = rows if len(rows) <= MANY else [rows[0], *(row for row in leaves(rows) if row is not rows[0])]
    y = quality(rows)
    charts = []
    for cost, label, better in (("size_mb", "size on disk (MB)", -1), ("tokens_per_second", "decode tokens/s", 1)):
        found = dots(few, cost, group=group)
        if len(found) > 1:
            svg = scatter(found, label, y.heading, x_better=better, y_better=y.better, ring=rows[0]["stage"], share=y.metric == "accuracy")
            charts.append((f"{y.heading} against {label}", svg, render_legend(dot.group for dot in found)))
    front = "Full dots on the dashed line are the front: none is better in one way without being worse in the other. Rings: all others, and the base."
    swept = dict.fromkeys(value.partition("=")[0] for row in few for value in values(row["stage"]))
    named = f" Names are values of {', '.join(swept)}." if swept else ""
    return render_plots(charts) + render("note", front + named) if charts else Markup()
