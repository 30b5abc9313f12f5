"""Charts as SVG text, in the colours of the page around them. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 340, 58, 20, 24, 44
COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#a16207", "#dc2626")
_MOST_LABELS = 24


@dataclass(frozen=True)
class Point:
    """A measured value at a place of the x axis, with the ends of its whisker; low = high: none."""

    x: float
    y: float
    low: float
    high: float
    title: str


@dataclass
class _Frame:
    """The area of a chart: axes from the first to the last of `xs` and `ys`, and what is drawn in it."""

    xs: Sequence[float]
    ys: Sequence[float]
    parts: list[str] = field(default_factory=list)

    def px(self, x: float) -> float:
        return LEFT + (x - self.xs[0]) / (self.xs[-1] - self.xs[0]) * (WIDTH - LEFT - RIGHT)

    def py(self, y: float) -> float:
        return HEIGHT - BOTTOM - (y - self.ys[0]) / (self.ys[-1] - self.ys[0]) * (HEIGHT - TOP - BOTTOM)

    def text(self, x: float, y: float, words: str, attributes: str = "") -> None:
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{escape(words)}</text>')

    def x_tick(self, x: float, words: str) -> None:
        self.text(self.px(x), HEIGHT - BOTTOM + 18, words, 'text-anchor="middle" class="dim"')

    def y_tick(self, y: float, words: str) -> None:
        line = f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{self.py(y):.1f}" y2="{self.py(y):.1f}" stroke="var(--line)"/>'
        self.parts.append(line)
        self.text(LEFT - 8, self.py(y) + 4, words, 'text-anchor="end" class="dim"')

    def labels(self, x: str, y: str) -> None:
        self.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x, 'text-anchor="middle"')
        self.text(LEFT, 15, y)

    def circle(self, x: float, y: float, colour: str, title: str, *, ring: bool = False) -> None:
        fill = "none" if ring else colour
        self.parts.append(
            f'<circle cx="{self.px(x):.1f}" cy="{self.py(y):.1f}" r="5" fill="{fill}" stroke="{colour}" stroke-width="2">'
            f"<title>{escape(title)}</title></circle>"
        )

    def svg(self, label: str) -> str:
        return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(self.parts)}</svg>'


def scatter(points: Sequence[tuple[float, float, str]], x_label: str, y_label: str, ring: str) -> str:
    """Points (x, y, name); the one called `ring` is a ring. Many points have their names only as tooltips."""
    frame = _Frame(axis([p[0] for p in points], zero=True), axis([p[1] for p in points], zero=False))
    for x in frame.xs:
        frame.x_tick(x, f"{x:g}")
    for y in frame.ys:
        frame.y_tick(y, f"{y:g}")
    frame.labels(x_label, y_label)
    taken: list[tuple[float, float]] = []
    for x, y, name in sorted(points, key=lambda p: -p[1]):
        frame.circle(x, y, "var(--mark)", f"{name}: {y_label} {y:.4g}, {x_label} {x:.4g}", ring=name == ring)
        if len(points) <= _MOST_LABELS:
            across, at = frame.px(x), frame.py(y) + 4
            while any(abs(across - a) < 110 and abs(at - d) < 13 for a, d in taken):
                at += 13  # labels of neighbours one below the other
            taken.append((across, at))
            flip = across > WIDTH - 140
            frame.text(across + (-10 if flip else 10), at, shortened(name, 18), 'text-anchor="end"' if flip else "")
    return frame.svg(f"{y_label} against {x_label}")


def lines(series: Mapping[str, Sequence[Point]], ticks: Sequence[str], x_label: str, y_label: str, base: float | None) -> str:
    """A line through the points of each series; x counts `ticks`, which stand at equal distances. `base` is a dashed line.

    y is logarithmic where the values differ by more than a factor of 10. With more series than colours only the points are drawn.
    """
    values = [value for points in series.values() for p in points for value in (p.low, p.high)] + ([base] if base is not None else [])
    log = min(values) > 0 and max(values) / min(values) > 10

    def at(y: float) -> float:
        return math.log10(y) if log else y

    marks = _decades(values) if log else axis(values, zero=False)
    frame = _Frame((-0.5, len(ticks) - 0.5), [at(mark) for mark in marks])
    for number, tick in enumerate(ticks):
        if number % math.ceil(len(ticks) / 12) == 0:
            frame.x_tick(number, shortened(tick, 12))
    for mark in marks:
        frame.y_tick(at(mark), f"{mark:g}")
    frame.labels(x_label, y_label + (" (logarithmic)" if log else ""))
    if base is not None:
        y = frame.py(at(base))
        frame.parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--dim)" stroke-dasharray="5 4"/>')
        frame.text(WIDTH - RIGHT, y - 5, "base", 'text-anchor="end" class="dim"')
    many = len(series) > len(COLOURS)
    for number, points in enumerate(series.values()):
        colour = "var(--mark)" if many else COLOURS[number]
        if not many:
            path = " ".join(f"{frame.px(p.x):.1f},{frame.py(at(p.y)):.1f}" for p in points)
            frame.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for p in points:
            if p.low < p.high:
                x, low, high = frame.px(p.x), frame.py(at(p.low)), frame.py(at(p.high))
                frame.parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{colour}" stroke-width="1.5"/>')
            frame.circle(p.x, at(p.y), colour, p.title)
    return frame.svg(f"{y_label} against {x_label}")


def legend(series: Sequence[str]) -> str:
    """What the colours of `lines` stand for, as HTML; empty where there is one line, or more than there are colours."""
    if not 1 < len(series) <= len(COLOURS):
        return ""
    marks = (f'<span style="color:{colour}">●</span> {escape(name)}' for colour, name in zip(COLOURS, series, strict=False))
    return f"<p>{' &nbsp; '.join(marks)}</p>"


def axis(values: Sequence[float], *, zero: bool) -> list[float]:
    """Round numbers that enclose the values, about five of them."""
    low, high = (0.0 if zero else min(values)), max(values)
    span = (high - low) or abs(high) or 1.0
    raw = span / 4
    power = 10.0 ** (len(f"{int(raw)}") - 1) if raw >= 1 else 10.0 ** -(next(i for i in range(1, 20) if raw * 10**i >= 1))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    first, last = int(low // step), int(-(-high // step))
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def _decades(values: Sequence[float]) -> list[float]:
    """Powers of ten that enclose positive values; with 3 between them where they are few."""
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    steps = (1, 3) if last - first <= 3 else (1,)
    return [step * 10.0**power for power in range(first, last) for step in steps] + [10.0**last]


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
