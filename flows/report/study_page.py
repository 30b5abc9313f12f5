"""A study's results as tables and as a plot beside the published one. Imports no torch."""

import base64
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from markupsafe import Markup, escape
from rich.markup import escape as plain
from rich.table import Table

from flows.planning.study import Study
from flows.report.charts import COLOURS, HEIGHT, PALETTE, WIDTH, Point, lines
from flows.report.rendering import render, render_table, word_cells
from flows.report.study_results import AGREES, DISAGREES, UNDECIDED, Difference, Metrics, Results, results
from tasks.measurement.figures import BETTER, FIGURES

_HEAD, _LEGEND, _GAP = 26, 22, 20
_PAPER = (  # on light and on dark paper
    "--paper: #fff; --ink: #1c2430; --dim: #667085; --line: #d5dae1; --card: #f6f7f9; --mark: #2563eb;",
    "--paper: #12161c; --ink: #e6e9ee; --dim: #98a2b3; --line: #384150; --card: #1b212a; --mark: #7aa7ff;",
)
_COLOUR = {AGREES: "green", DISAGREES: "bold red", UNDECIDED: "yellow"}


def settings_rows(found: Results) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row for the base, each stage beside it and each setting: mean over seeds, the lowest and the highest in brackets."""
    study = found.study
    axes = [axis.label for axis in study.axes().values()]
    empty = [""] * (len(axes) - 1)
    rows = [[name, *empty, *_figures(metrics, study.metrics)] for name, metrics in found.beside.items()]
    rows += [
        [setting.x, *([setting.line] if study.lines else []), *_figures(list(setting.seeds.values()), study.metrics)]
        for setting in found.settings
    ]
    return [*axes, *map(heading, study.metrics)], rows


def claims_rows(found: Results) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row for each difference of each claim; the claim's words stand in the first of its rows."""
    rows = []
    for judged in found.judged:
        for number, difference in enumerate(judged.differences):
            words = [judged.claim.says, heading(judged.claim.metric)] if number == 0 else ["", ""]
            rows.append([*words, difference.what, interval(difference), difference.outcome])
    return ["claim", "judged by", "compared", "holds by (95%)", "outcome"], rows


def verdict(found: Results) -> str:
    """What came of the claims, in a sentence or two."""
    count = {outcome: sum(judged.outcome == outcome for judged in found.judged) for outcome in (AGREES, UNDECIDED, DISAGREES)}
    if not found.judged:
        return "The study makes no claim."
    parts = [f"{number} {outcome}" for outcome, number in count.items() if number]
    return f"Of {len(found.judged)} claim{'s' if len(found.judged) > 1 else ''}: {', '.join(parts)}."


def tables(found: Results) -> list[Table]:
    """Both tables, for the terminal."""
    headings, rows = settings_rows(found)
    shown = Table(title=plain(found.study.question), caption="mean over seeds, the lowest and the highest in brackets")
    for number, text in enumerate(headings):
        shown.add_column(plain(text), justify="left" if number < len(found.study.axes()) else "right", no_wrap=True)
    for row in rows:
        shown.add_row(*map(plain, row))
    if not found.judged:
        return [shown]
    headings, rows = claims_rows(found)
    claims = Table(title=plain(found.study.paper), caption="differences of the same seeds; above 0 the claim holds")
    for text in headings:
        claims.add_column(text, justify="right" if text.startswith("holds") else "left", no_wrap=text not in ("claim", "compared"))
    for row in rows:
        claims.add_row(*map(plain, row[:-1]), f"[{_COLOUR[row[-1]]}]{row[-1]}[/]")
    return [shown, claims]


def markdown(found: Results) -> str:
    """Question, paper, both tables and the verdict."""
    study, axes = found.study, len(found.study.axes())
    parts = [study.question, f"{study.paper}: {study.finding}", _markdown(*settings_rows(found), words=axes)]
    if found.judged:
        parts.append(_markdown(*claims_rows(found), words=3))
    return "\n\n".join([*parts, verdict(found)]) + "\n"


def study_section(summary: dict[str, Any]) -> Markup:
    """Render a study for the report page; empty for a recipe without a study. Of a run that has not all results, a note instead of what they would tell."""
    if not summary["recipe"].get("study"):
        return Markup()
    study = Study.model_validate(summary["recipe"]["study"])
    if missing := _missing(summary):
        return Markup("<p>{}</p>").format(study.question) + render("note", f"Nothing is concluded: {missing}.")
    found = results(study, summary)
    picture = base64.b64encode(svg(found).encode()).decode()  # in an image of its own its style changes nothing on the page
    shown = [settings_rows(found), claims_rows(found)] if found.judged else [settings_rows(found)]
    head = render("study", study.question, verdict(found), f"{study.paper}: {study.finding}", picture)
    return head + Markup().join(render_table(word_cells(heads), [word_cells(row, "wrap") for row in rows]) for heads, rows in shown)


def _missing(summary: dict[str, Any]) -> str:
    """Why a run does not answer its study; empty where it has every result of the sweep."""
    sweep = summary["sweep"]
    if sweep is None:
        return "this run, of a part of the recipe, has no result of the sweep"
    if left_out := sweep.get("left_out"):
        return f"this run, of a part of the recipe, lacks {left_out} results of the sweep"
    broken = sum(row["state"] not in ("Completed", "Cached") for row in summary["rows"])
    return f"{broken} stage{'s are' if broken > 1 else ' is'} not done" if broken else ""


def svg(found: Results) -> str:
    """A picture by itself, in light and dark: our means with whiskers from the lowest to the highest seed, the published figures beside them."""
    published = found.study.published
    drawn = [metric for metric in found.study.metrics if any(setting.values(metric) for setting in found.settings)][:2]
    panels = [[("here", _ours(found, metric)) for metric in drawn]]
    if published:  # a row for each metric, the published one beside ours
        panels = [
            [ours, *([("published", _theirs(found, metric))] if metric in published.values else [])]
            for metric, ours in zip(drawn, panels[0], strict=True)
        ]
    named = found.lines if len(found.lines) > 1 else []
    step = HEIGHT + _HEAD + _GAP
    width, height = max(map(len, panels), default=0) * (WIDTH + _GAP) + _GAP, len(panels) * step + _GAP + (_LEGEND if named else 0)
    parts = [_legend(found.study.lines.label, named)] if named and found.study.lines else []
    for down, row in enumerate(panels):
        for across, (title, chart) in enumerate(row):
            x, y = _GAP + across * (WIDTH + _GAP), _GAP + down * step + (_LEGEND if named else 0)
            parts.append(f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT + _HEAD}" rx="8" fill="var(--card)"/>')
            parts.append(f'<text x="{x + 14}" y="{y + 20}" font-weight="600">{title}</text>')
            parts.append(str(chart).replace("<svg ", f'<svg x="{x}" y="{y + _HEAD}" width="{WIDTH}" height="{HEIGHT}" ', 1))
    light, dark = (f"{paper} {' '.join(f'--c{n}: {pair[i]};' for n, pair in enumerate(PALETTE))}" for i, paper in enumerate(_PAPER))
    style = (
        f":root {{ {light} }} @media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }} "
        "text { font: 12px system-ui, sans-serif; fill: var(--ink) } .dim { fill: var(--dim) }"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'aria-label="{escape(found.study.question)}"><style>{style}</style>'
        f'<rect width="100%" height="100%" fill="var(--paper)"/>{"".join(parts)}</svg>\n'
    )


def interval(difference: Difference) -> str:
    """`+0.012 (+0.004…+0.020)`; of a single seed the difference alone; `not measured` without any."""
    if not difference.values:
        return "not measured"
    mean, reach = difference.mean, difference.reach
    if len(difference.values) == 1:
        return f"{mean:+.4f} (one seed)"
    return f"{mean:+.4f} ({mean - reach:+.4f}…{mean + reach:+.4f})"


def heading(metric: str) -> str:
    return next((figure.heading for figure in FIGURES if figure.metric == metric), metric)


def _figures(seeds: Sequence[Metrics], metrics: Sequence[str]) -> list[str]:
    return [_spread([one[metric] for one in seeds if metric in one]) for metric in metrics]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    middle = f"{fmean(values):.3f}"
    return middle if min(values) == max(values) else f"{middle} ({min(values):.3f}–{max(values):.3f})"


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> str:
    aligned = ["---" if number < words or text == "outcome" else "---:" for number, text in enumerate(headings)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [headings, aligned, *rows])


def _ours(found: Results, metric: str) -> str:
    series: dict[str, list[Point]] = {line: [] for line in found.lines}
    for setting in found.settings:
        if values := setting.values(metric):
            mean, place = fmean(values), f"{setting.x} {setting.line}".strip()
            series[setting.line].append(Point(found.xs.index(setting.x), mean, min(values), max(values), f"{place}: {mean:.4g}"))
    base = next(iter(found.beside.values()))[0].get(metric)
    return lines(series, found.xs, found.study.x.label, _better(metric), base)


def _theirs(found: Results, metric: str) -> str:
    published = found.study.published
    assert published
    points = [Point(x, y, y, y, f"{at}: {y:g}") for x, (at, y) in enumerate(zip(published.at, published.values[metric], strict=True))]
    return lines({"": points}, published.at, found.study.x.label, _better(metric), None)


def _better(metric: str) -> str:
    """`perplexity · ↓ better`."""
    way = BETTER.get(metric, 0)
    return f"{heading(metric)} · {'↑' if way > 0 else '↓'} better" if way else heading(metric)


def _legend(label: str, names: Sequence[str]) -> str:
    across, parts = _GAP + 7.0 * (len(label) + 2), [f'<text x="{_GAP}" y="{_GAP + 2}">{escape(label)}:</text>']
    for colour, name in zip(COLOURS, names, strict=False):
        parts.append(f'<circle cx="{across + 5:.1f}" cy="{_GAP - 2}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{across + 16:.1f}" y="{_GAP + 2}">{escape(name)}</text>')
        across += 36 + 7 * len(name)
    return "".join(parts)
