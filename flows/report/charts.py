"""Charts as SVG text, in the colours of the page around them. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from markupsafe import Markup, escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 340, 58, 20, 24, 44
PALETTE = (  # on light and on dark paper
    ("#2563eb", "#7aa7ff"), ("#d97706", "#f59e0b"), ("#059669", "#34d399"), ("#db2777", "#f472b6"), ("#7c3aed", "#a78bfa"),
    ("#0891b2", "#22d3ee"), ("#a16207", "#eab308"), ("#dc2626", "#f87171"),
)  # fmt: skip
COLOURS = tuple(f"var(--c{number})" for number in range(len(PALETTE)))  # the page gives these their values
_LETTER = 6.6  # width of a letter, roughly
_MOST_LABELS = 24


@dataclass(frozen=True)
class Point:
    """A measured value at a place of the x axis, with the ends of its whisker; low = high: none."""

    x: float
    y: float
    low: float
    high: float
    title: str


@dataclass(frozen=True)
class Dot:
    """A named point of a scatter plot, with the ends of its whisker, what its colour tells, and what is written beside it."""

    x: float
    y: float
    name: str
    low: float
    high: float
    group: str = ""
    label: str = ""
    failed: bool = False


@dataclass
class Frame:
    """The area of a chart: axes from the first to the last of `xs` and `ys`, and what is drawn in it."""

    xs: Sequence[float]
    ys: Sequence[float]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = RIGHT
    parts: list[str] = field(default_factory=list)

    def px(self, x: float) -> float:
        return self.left + (x - self.xs[0]) / (self.xs[-1] - self.xs[0]) * (self.width - self.left - self.right)

    def py(self, y: float) -> float:
        return self.height - BOTTOM - (y - self.ys[0]) / (self.ys[-1] - self.ys[0]) * (self.height - TOP - BOTTOM)

    def text(self, x: float, y: float, words: str, attributes: str = "") -> None:
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{escape(words)}</text>')

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str, attributes: str = "") -> None:
        self.parts.append(f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}" stroke="{colour}" {attributes}/>')

    def path(self, places: Sequence[tuple[float, float]], colour: str, attributes: str) -> None:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        self.parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" {attributes}/>')

    def x_tick(self, x: float, words: str) -> None:
        self.text(self.px(x), self.height - BOTTOM + 18, words, 'text-anchor="middle" class="dim"')

    def y_tick(self, y: float, words: str) -> None:
        self.line(self.left, self.py(y), self.width - self.right, self.py(y), "var(--line)")
        self.text(self.left - 8, self.py(y) + 4, words, 'text-anchor="end" class="dim"')

    def labels(self, x: str, y: str) -> None:
        self.text((self.left + self.width - self.right) / 2, self.height - 8, x, 'text-anchor="middle"')
        self.text(self.left, 15, y)

    def circle(self, x: float, y: float, colour: str, title: str, *, hollow: bool = False) -> None:
        fill = "var(--card)" if hollow else colour
        self.parts.append(
            f'<circle cx="{self.px(x):.1f}" cy="{self.py(y):.1f}" r="5" fill="{fill}" stroke="{colour}" stroke-width="2">'
            f"<title>{escape(title)}</title></circle>"
        )

    def whisker(self, x: float, low: float, high: float, colour: str) -> None:
        if low < high:
            self.line(self.px(x), self.py(low), self.px(x), self.py(high), colour, 'stroke-width="1.5" stroke-opacity="0.6"')

    def svg(self, label: str) -> Markup:
        """The chart; it shrinks with the page, but never grows beyond its own size by more than a third."""
        return Markup(
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(label)}" '
            f'style="max-width:{self.width * 4 // 3}px">{"".join(self.parts)}</svg>'
        )


@dataclass(frozen=True)
class Scale:
    """How values become places: as they are, or as their logarithms."""

    marks: Sequence[float]
    log: bool

    def at(self, value: float) -> float:
        if not math.isfinite(value):  # an infinite perplexity stands at the edge
            value = self.marks[0] if value < 0 else self.marks[-1]
        return math.log10(value) if self.log else value

    @property
    def places(self) -> list[float]:
        return [self.at(mark) for mark in self.marks]

    def named(self, label: str) -> str:
        return f"{label} (logarithmic)" if self.log else label


def scale(values: Sequence[float], *, share: bool = False) -> Scale:
    """Logarithmic where all values are positive and differ by more than a factor of 10. A `share` (an accuracy) never is."""
    values = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    log = not share and min(values) > 0 and max(values) / min(values) > 10
    return Scale(_decades(values) if log else axis(values, zero=False), log)


def front(dots: Sequence[Dot], x_better: int, y_better: int) -> list[Dot]:
    """The Pareto front from left to right: of the dots that did not fail, those than which none is better in one way without being worse in the other.

    x_better, y_better  1 where higher is better, -1 where lower is
    """
    found: list[Dot] = []
    for dot in sorted((d for d in dots if not d.failed), key=lambda d: (-x_better * d.x, -y_better * d.y)):  # the best x first
        if not found or y_better * dot.y > y_better * found[-1].y or (dot.x, dot.y) == (found[-1].x, found[-1].y):
            found.append(dot)
    return sorted(found, key=lambda d: (d.x, d.y))


def scatter(
    dots: Sequence[Dot], x_label: str, y_label: str, *, x_better: int, y_better: int, ring: str, share: bool = False
) -> Markup:  # fmt: skip
    """Quality against a cost. Dots of the front are full and named along its line, the one called `ring` is a ring, the others are hollow.

    A dot away from the front has its name only as a tooltip where there are many, or no room is left for it.
    """
    best = front(dots, x_better, y_better)
    groups = list(dict.fromkeys(dot.group for dot in dots))
    ys = scale([value for dot in dots for value in (dot.low, dot.high)], share=share)
    frame = Frame(axis([dot.x for dot in dots], zero=True), ys.places)
    for x in frame.xs:
        frame.x_tick(x, f"{x:g}")
    for y in ys.marks:
        frame.y_tick(ys.at(y), f"{y:g}")
    better = f"{'↑' if y_better > 0 else '↓'} better"
    frame.labels(f"{x_label} · {'→' if x_better > 0 else '←'} better", f"{ys.named(y_label)} · {better}")
    frame.path(_staircase(frame, ys, best, x_better), "var(--mark)", 'stroke-width="1.5" stroke-dasharray="6 4"')
    for dot in sorted(dots, key=lambda d: d in best):
        colour = COLOURS[groups.index(dot.group) % len(COLOURS)]
        frame.whisker(dot.x, ys.at(dot.low), ys.at(dot.high), colour)
        title = f"{dot.name}{' (failed)' if dot.failed else ''}: {y_label} {dot.y:.4g}, {x_label} {dot.x:.4g}"
        frame.circle(dot.x, ys.at(dot.y), colour, title, hollow=dot.name == ring or dot not in best)
    named = list(dots) if len(dots) <= _MOST_LABELS else [dot for dot in dots if dot in best or dot.name == ring]
    _name(frame, ys, sorted(named, key=lambda d: (d not in best, d.name != ring)), dots, best)
    return frame.svg(f"{y_label} against {x_label}")


def _staircase(frame: Frame, ys: Scale, best: Sequence[Dot], x_better: int) -> list[tuple[float, float]]:
    """The edge of what the front reaches: at each x the best y that is to be had there."""
    places = [(frame.px(dot.x), frame.py(ys.at(dot.y))) for dot in best]
    path = places[:1]
    for (x1, y1), (x2, y2) in pairwise(places):
        path += [(x2, y1) if x_better < 0 else (x1, y2), (x2, y2)]
    return path


def _name(frame: Frame, ys: Scale, named: Sequence[Dot], dots: Sequence[Dot], best: Sequence[Dot]) -> None:
    """Names beside their dots, where none covers another or a dot."""
    taken = [(frame.px(d.x) - 6, frame.py(ys.at(d.y)) - 6, frame.px(d.x) + 6, frame.py(ys.at(d.y)) + 6) for d in dots]
    for dot in named:
        words, x, y = shortened(dot.label or dot.name, 24), frame.px(dot.x), frame.py(ys.at(dot.y))
        long = _LETTER * len(words)
        sides = [(x + 10, y, "start"), (x - 10, y, "end"), (x, y - 14, "middle"), (x, y + 14, "middle")]
        sides += [(x + 10, y + step, "start") for step in (-13, 13, -26, 26)] + [(x - 10, y + step, "end") for step in (-13, 13, -26, 26)]
        for across, middle, anchor in sides:
            start = across - {"start": 0.0, "middle": long / 2, "end": long}[anchor]
            box = (start - 3, middle - 7, start + long + 3, middle + 7)
            inside = box[0] >= frame.left and box[2] <= frame.width and box[1] >= TOP - 6 and box[3] <= frame.height - BOTTOM
            if inside and not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
                taken.append(box)
                weight = ' font-weight="600"' if dot in best else ' class="dim"'
                halo = 'style="paint-order: stroke; stroke: var(--card); stroke-width: 3px"'  # a line behind does not strike it out
                frame.text(across, middle + 4, words, f'text-anchor="{anchor}"{weight} {halo}')
                break


def lines(
    series: Mapping[str, Sequence[Point]], ticks: Sequence[str], x_label: str, y_label: str, base: float | None, *, share: bool = False
) -> Markup:  # fmt: skip
    """A line through the points of each series; x counts `ticks`, which stand at equal distances. `base` is a dashed line.

    With more series than colours only the points are drawn.
    """
    values = [value for points in series.values() for p in points for value in (p.low, p.high)]
    ys = scale([*values, *([base] if base is not None else [])], share=share)
    frame = Frame((-0.5, len(ticks) - 0.5), ys.places)
    for number, tick in enumerate(ticks):
        if number % math.ceil(len(ticks) / 12) == 0:
            frame.x_tick(number, shortened(tick, 12))
    for mark in ys.marks:
        frame.y_tick(ys.at(mark), f"{mark:g}")
    frame.labels(x_label, ys.named(y_label))
    if base is not None:
        y = frame.py(ys.at(base))
        frame.line(LEFT, y, WIDTH - RIGHT, y, "var(--dim)", 'stroke-dasharray="5 4"')
        frame.text(WIDTH - RIGHT, y - 5, "base", 'text-anchor="end" class="dim"')
    many = len(series) > len(COLOURS)
    for number, points in enumerate(series.values()):
        colour = "var(--mark)" if many else COLOURS[number]
        if not many:
            frame.path([(frame.px(p.x), frame.py(ys.at(p.y))) for p in points], colour, 'stroke-width="2"')
        for p in points:
            frame.whisker(p.x, ys.at(p.low), ys.at(p.high), colour)
            frame.circle(p.x, ys.at(p.y), colour, p.title)
    return frame.svg(f"{y_label} against {x_label}")


def curves(series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> Markup:
    """A line through (x, y) of each series, without marks. With more series than colours all have one, and are thin."""
    ys = scale([y for points in series.values() for _, y in points])
    frame = Frame(axis([x for points in series.values() for x, _ in points], zero=True), ys.places)
    for x in frame.xs:
        frame.x_tick(x, f"{x:g}")
    for mark in ys.marks:
        frame.y_tick(ys.at(mark), f"{mark:g}")
    frame.labels(x_label, ys.named(y_label))
    many = len(series) > len(COLOURS)
    for number, points in enumerate(series.values()):
        colour, width = ("var(--mark)", "0.7") if many else (COLOURS[number], "2")
        frame.path([(frame.px(x), frame.py(ys.at(y))) for x, y in points], colour, f'stroke-width="{width}" stroke-linejoin="round"')
    return frame.svg(f"{y_label} against {x_label}")


def axis(values: Sequence[float], *, zero: bool) -> list[float]:
    """Round numbers that enclose the values, about five of them. Values that differ by less than the numbers can tell count as one."""
    low, high = (0.0 if zero else min(values)), max(values)
    size = max(abs(low), abs(high))
    span = high - low if high - low > 1e-5 * size else size
    raw = (span if span > 1e-300 else 1.0) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    first, last = int(low // step), int(-(-high // step))
    digits = 2 - math.floor(math.log10(step))
    return [round(i * step, digits) for i in range(first, max(last, first + 1) + 1)]


def _decades(values: Sequence[float]) -> list[float]:
    """Powers of ten that enclose positive values; with 3 between them where they are few."""
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    steps = (1, 3) if last - first <= 3 else (1,)
    return [step * 10.0**power for power in range(first, last) for step in steps] + [10.0**last]


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
