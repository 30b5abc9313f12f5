"""The report's picture of the graph: each stage's state and time. Imports no torch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from flows.report.charts import shortened
from flows.report.rendering import state_class
from flows.report.rows import MANY, Row, origin

_WIDTH, _HEIGHT, _ACROSS, _DOWN = 170, 50, 212, 72
_WORST = ("Failed", "Stopped", "Skipped", "Running", "Completed", "Cached")


@dataclass(frozen=True)
class _Box:
    """A stage, or all copies of one: its parent first among what it needs."""

    name: str
    needs: tuple[str, ...]
    state: str
    below: str
    title: str


def graph_section(rows: Sequence[Row]) -> Markup:
    """Draw boxes in columns by depth, with a line from each stage to those that need it; dashed where they do not start from its checkpoint.

    Of a graph of very many stages the copies of each are one box.
    """
    boxes = [_box(row) for row in rows] if len(rows) <= MANY else _folded(rows)
    return Markup('<div class="scroll">{}</div>').format(_draw(boxes))


def _box(row: Row) -> _Box:
    swept = row["stage"].partition("@")[2]
    status = f"{row['state'].lower()} · {row['seconds']:.1f} s"
    title = f"{row['stage']}, {row['uses']}: {status}"
    return _Box(row["stage"], tuple(row["needs"]), row["state"], shortened(swept, 26) if swept else status, title)


def _folded(rows: Sequence[Row]) -> list[_Box]:
    boxes = []
    for name in dict.fromkeys(origin(row["stage"]) for row in rows):
        copies = [row for row in rows if origin(row["stage"]) == name]
        states = Counter(row["state"] for row in copies)
        seconds = sum(row["seconds"] for row in copies)
        counts = ", ".join(f"{count} {state.lower()}" for state, count in states.items())
        needs = tuple(dict.fromkeys(origin(need) for row in copies for need in row["needs"]))
        worst = min(states, key=_WORST.index)
        below = f"{counts} · {seconds:.0f} s" if len(states) == 1 else counts
        boxes.append(_Box(name, needs, worst, below, f"{name}, {copies[0]['uses']}: {counts}; {seconds:.1f} s together"))
    return boxes


def _draw(boxes: Sequence[_Box]) -> Markup:
    place = _places(boxes)
    width = _ACROSS * (1 + max(column for column, _ in place.values())) - _ACROSS + _WIDTH + 20
    height = _DOWN * (1 + max(line for _, line in place.values())) + 10
    parts = []
    for box in boxes:
        x, y = _corner(place[box.name])
        for number, need in enumerate(n for n in box.needs if n in place):
            fx, fy = _corner(place[need])
            if number == 0:
                curve = f"M{fx + _WIDTH},{fy + 25} C{fx + _WIDTH + 22},{fy + 25} {x - 22},{y + 25} {x},{y + 25}"
                parts.append(f'<path d="{curve}" fill="none" stroke="var(--dim)" stroke-width="1.5"/>')
            else:  # a teacher, a corpus: below the boxes in between
                curve = f"M{fx + 85},{fy + 50} C{fx + 110},{fy + 76} {x + 60},{y + 76} {x + 85},{y + 50}"
                parts.append(f'<path d="{curve}" fill="none" stroke="var(--dim)" stroke-dasharray="4 4"/>')
    for box in boxes:
        x, y = _corner(place[box.name])
        parts.append(
            f"<g><title>{escape(box.title)}</title>"
            f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="8" fill="var(--card)" class="{state_class(box.state)}" '
            f'stroke-width="2"/><text x="{x + 10}" y="{y + 21}" class="strong">{escape(shortened(origin(box.name), 22))}</text>'
            f'<text x="{x + 10}" y="{y + 39}" class="dim">{escape(shortened(box.below, 26))}</text></g>'
        )
    style = f"min-width:{min(width, 900)}px;max-width:{width}px"
    return Markup(f'<svg viewBox="0 0 {width} {height}" style="{style}" role="img" aria-label="The stages">{"".join(parts)}</svg>')


def _places(boxes: Sequence[_Box]) -> dict[str, tuple[int, int]]:
    """Column and line of each box: as deep as what it needs, beside its parent where there is room."""
    place: dict[str, tuple[int, int]] = {}
    filled: dict[int, int] = {}
    for box in boxes:
        known = [place[need] for need in box.needs if need in place]
        column = max((column + 1 for column, _ in known), default=0)
        line = max(filled.get(column, 0), known[0][1] if known else 0)
        place[box.name] = (column, line)
        filled[column] = line + 1
    return place


def _corner(place: tuple[int, int]) -> tuple[int, int]:
    return 10 + place[0] * _ACROSS, 10 + place[1] * _DOWN
