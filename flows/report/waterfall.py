"""Where each point of quality went: from the base along every path, what each stage took or gave back. Imports no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from flows.report.charts import BOTTOM, TOP, Frame, Scale, scale, shortened
from flows.report.rendering import render
from flows.report.rows import Row, beside, parent, quality, shown
from tasks.measurement.figures import Figure, noise

_LINE, _WIDTH, _LEFT, _RIGHT = 24, 940, 270, 120


@dataclass(frozen=True)
class _Step:
    """A stage in the order of the paths: `branch` draws the tree before its name, `above` is where its parent stands."""

    row: Row
    branch: str
    above: int | None


def waterfall_section(rows: Sequence[Row]) -> Markup:
    """Draw a bar for each stage, from its parent's quality to its own. Empty where fewer than two stages have a quality."""
    few = shown(rows)
    figure = quality(rows)
    if sum(figure.metric in row["metrics"] for row in few) < 2:
        return Markup()
    left_out = f" Of {len(rows)} stages these are the paths to the best results." if len(few) < len(rows) else ""
    whiskers = (
        " Whiskers: 95% interval of a stage's difference from the base."
        if any(_to_base(row, figure, 0.0, 1.0) for row in few)
        else " Whiskers: 95% interval."
        if any(noise(row["metrics"], figure.metric) for row in few)
        else ""
    )
    note = render("note", f"Each bar reaches from the {figure.heading} of the stage it follows to its own.{whiskers}{left_out}")
    return Markup('<div class="card scroll"><div style="min-width:600px">{}</div></div>').format(_draw(list(_walk(few)), figure)) + note


def _walk(rows: Sequence[Row]) -> Iterator[_Step]:
    """Every stage right after its parent or its parent's other branches; a path without branches goes straight down."""
    place: dict[str, int] = {}

    def walk(row: Row, lead: str, knot: str) -> Iterator[_Step]:
        above = place.get(parent(row) or "")
        place[row["stage"]] = len(place)
        yield _Step(row, lead + knot, above)
        below = [other for other in rows if parent(other) == row["stage"]]
        deeper = lead + {"├ ": "│ ", "└ ": "  ", "": ""}[knot]
        for number, other in enumerate(below):
            yield from walk(other, deeper, "" if len(below) == 1 else "└ " if number == len(below) - 1 else "├ ")

    yield from walk(rows[0], "", "")


def _to_base(row: Row, figure: Figure, base: float, unit: float) -> tuple[float, float] | None:
    """The interval of the difference from the base, put on the base's value."""
    metrics = row["metrics"]
    if figure.metric == "accuracy" and "accuracy_delta_low" in metrics:
        return base + metrics["accuracy_delta_low"], base + metrics["accuracy_delta_high"]
    if figure.metric == "perplexity" and "perplexity_ratio_low" in metrics:
        return unit * metrics["perplexity_ratio_low"], unit * metrics["perplexity_ratio_high"]
    return None


def _draw(steps: Sequence[_Step], figure: Figure) -> Markup:
    base = steps[0].row["metrics"].get(figure.metric)
    whiskers = {}
    for number, step in enumerate(steps):
        if figure.metric in step.row["metrics"]:
            paired = _to_base(step.row, figure, base, base) if base is not None and number else None
            ends = paired or noise(step.row["metrics"], figure.metric)
            whiskers[number] = (max(ends[0], 0.0), min(ends[1], 1.0)) if ends and figure.metric == "accuracy" else ends
    values = [step.row["metrics"][figure.metric] for step in steps if figure.metric in step.row["metrics"]]
    reach = [end for ends in whiskers.values() if ends for end in ends]
    xs = scale([*values, *reach], share=figure.metric == "accuracy")
    height = TOP + BOTTOM + _LINE * len(steps)
    frame = Frame(xs.places, (0, 1), _WIDTH, height, _LEFT, _RIGHT)
    for mark in xs.marks:
        frame.line(frame.px(xs.at(mark)), TOP, frame.px(xs.at(mark)), height - BOTTOM, "var(--line)")
        frame.x_tick(xs.at(mark), f"{mark:g}")
    frame.text((_LEFT + _WIDTH - _RIGHT) / 2, height - 8, xs.named(figure.heading), 'text-anchor="middle"')
    for number in range(len(steps)):
        _bar(frame, steps, number, figure, whiskers.get(number), xs)
    return frame.svg(f"{figure.heading} from stage to stage")


def _bar(frame: Frame, steps: Sequence[_Step], number: int, figure: Figure, ends: tuple[float, float] | None, xs: Scale) -> None:
    step, y = steps[number], TOP + _LINE * number + _LINE / 2
    frame.text(10, y + 4, shortened(step.branch + beside(step.row["stage"], parent(step.row)), 40), 'xml:space="preserve"')
    value = step.row["metrics"].get(figure.metric)
    if value is None:
        frame.text(_LEFT + 6, y + 4, f"{step.row['state'].lower()}, not measured", 'class="dim"')
        return
    here = frame.px(xs.at(value))
    before = None if step.above is None else steps[step.above].row["metrics"].get(figure.metric)
    if before is None:
        frame.line(here, y - 9, here, y + 9, "var(--ink)", 'stroke-width="3"')
        frame.text(_WIDTH - _RIGHT + 12, y + 4, figure.value(value))
        return
    assert step.above is not None
    start = frame.px(xs.at(before))
    frame.line(start, TOP + _LINE * step.above + _LINE / 2 + 9, start, y - 9, "var(--dim)", 'stroke-dasharray="2 3"')
    better = (value - before) * figure.better > 0
    colour = "var(--dim)" if value == before else "var(--Completed)" if better else "var(--Failed)"
    x, width = min(start, here), max(abs(here - start), 2)
    title = escape(f"{step.row['stage']}: {figure.value(before)} to {figure.value(value)}")
    frame.parts.append(
        f'<rect x="{x:.1f}" y="{y - 8:.1f}" width="{width:.1f}" height="16" fill="{colour}" fill-opacity="0.75"><title>{title}</title></rect>'
    )
    if ends:
        low, high = (frame.px(xs.at(end)) for end in ends)
        frame.line(low, y, high, y, "var(--ink)", 'stroke-opacity="0.7"')
        for end in (low, high):
            frame.line(end, y - 4, end, y + 4, "var(--ink)", 'stroke-opacity="0.7"')
    frame.text(_WIDTH - _RIGHT + 12, y + 4, f"{figure.value(value)} ({value - before:+.3f})")
