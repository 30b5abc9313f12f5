import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.report.charts import COLOURS, Dot, Point, axis, curves, front, lines, scatter
from flows.report.rendering import render_legend


@pytest.mark.parametrize(
    "values",
    [
        [0.9, 0.9], [0.2, 0.95], [1e-5, 3e-5], [58.7, 59.3], [3.0, 4000.0], [0.0, 0.0], [7.0], [1.719, 1.719 + 1e-11], [1e-12, 3e-12],
        [0.0, 2e-11], [1e-25, 2e-25], [5e-324, 5e-324], [1e18, 1e18 + 4096],
    ],
)  # fmt: skip
@pytest.mark.parametrize("zero", [True, False])
def test_axes_enclose_their_values(values: list[float], zero: bool) -> None:
    marks = axis(values, zero=zero)
    assert marks == sorted(set(marks))
    assert marks[0] <= min(values)
    assert marks[-1] >= max(values)
    assert 2 <= len(marks) <= 8


def place(svg: str) -> list[tuple[float, float]]:
    return [(float(c.get("cx", "")), float(c.get("cy", ""))) for c in ElementTree.fromstring(svg).findall("circle")]


def points(*values: float) -> list[Point]:
    return [Point(x, y, y, y, f"point {x}") for x, y in enumerate(values)]


def test_lines_stand_where_their_values_are() -> None:
    svg = lines({"a": points(1.0, 2.0, 3.0), "b": points(3.0, 2.0, 1.0)}, ["0.5", "1", "<2>"], "temperature", "perplexity", 2.0)
    (a, b), dots = ElementTree.fromstring(svg).findall("polyline"), place(svg)
    assert [tuple(map(float, p.split(","))) for p in (a.get("points") or "").split()] == dots[:3]
    assert a.get("stroke") != b.get("stroke")
    assert dots[1] == dots[4]
    assert dots[0][1] == dots[5][1] > dots[1][1] > dots[2][1], "larger values stand higher"
    assert dots[1][0] - dots[0][0] == pytest.approx(dots[2][0] - dots[1][0], abs=0.11)
    dashed = next(line for line in ElementTree.fromstring(svg).findall("line") if line.get("stroke-dasharray"))
    assert float(dashed.get("y1", "")) == dots[1][1], "the base's line is at its value"
    assert "&lt;2&gt;" in svg and "logarithmic" not in svg


def test_values_far_apart_stand_on_a_logarithmic_axis() -> None:
    svg = lines({"": points(1.0, 10.0, 100.0)}, ["a", "b", "c"], "x", "perplexity", None)
    (_, low), (_, middle), (_, high) = place(svg)
    assert low - middle == pytest.approx(middle - high, abs=0.11)
    assert "perplexity (logarithmic)" in svg


def test_an_infinite_value_stands_at_the_edge() -> None:
    svg = lines({"": points(1.0, 2.0, math.inf)}, ["a", "b", "c"], "x", "perplexity", None)
    (_, _), (_, middle), (_, edge) = place(svg)
    assert edge <= middle and "nan" not in svg


def test_whiskers_reach_from_low_to_high() -> None:
    svg = lines({"": [Point(0, 0.5, 0.4, 0.6, "p"), Point(1, 0.6, 0.6, 0.6, "q")]}, ["a", "b"], "x", "accuracy", None)
    upright = [line for line in ElementTree.fromstring(svg).findall("line") if line.get("x1") == line.get("x2")]
    assert len(upright) == 1
    middle = (float(upright[0].get("y1", "")) + float(upright[0].get("y2", ""))) / 2
    assert middle == pytest.approx(place(svg)[0][1], abs=0.11)


def test_more_series_than_colours_are_points_without_a_legend() -> None:
    series = {f"s{n}": points(n, n + 1) for n in range(len(COLOURS) + 1)}
    svg = lines(series, ["a", "b"], "x", "y", None)
    assert "polyline" not in svg and len(place(svg)) == 2 * len(series)
    assert render_legend(list(series)) == render_legend(["one"]) == ""
    assert re.findall(r"var\(--c[0-9]\)", render_legend(["one", "two"])) == list(COLOURS[:2])


def dot(x: float, y: float, name: str = "") -> Dot:
    return Dot(x, y, name or f"{x}/{y}", y, y)


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12), st.sampled_from([1, -1]), st.sampled_from([1, -1])
)
def test_the_front_is_what_nothing_beats(places: list[tuple[int, int]], x_better: int, y_better: int) -> None:
    dots = [dot(x, y, str(n)) for n, (x, y) in enumerate(places)]

    def beaten(a: Dot) -> bool:
        gains = [(x_better * (b.x - a.x), y_better * (b.y - a.y)) for b in dots]
        return any(dx >= 0 and dy >= 0 and (dx, dy) != (0, 0) for dx, dy in gains)

    found = front(dots, x_better, y_better)
    assert {d.name for d in found} == {d.name for d in dots if not beaten(d)}
    assert [d.x for d in found] == sorted(d.x for d in found)


def test_the_front_is_full_and_the_rest_is_hollow() -> None:
    dots = [dot(9, 0.9, "base"), dot(2, 0.7, "small"), dot(4, 0.85, "good"), dot(4, 0.6, "beaten")]
    chart = ElementTree.fromstring(scatter(dots, "size", "accuracy", x_better=-1, y_better=1, ring="base", share=True))
    full = {(c.findtext("title") or "").partition(":")[0] for c in chart.findall("circle") if c.get("fill") != "var(--card)"}
    assert full == {"small", "good"}
    (line,) = (p for p in chart.findall("polyline"))
    corners = [tuple(map(float, p.split(","))) for p in (line.get("points") or "").split()]
    at = {
        name: (x, y)
        for name, (x, y) in zip(
            [d.name for d in sorted(dots, key=lambda d: d.name != "beaten")], place(ElementTree.tostring(chart, "unicode")), strict=True
        )
    }
    assert corners[0] == at["small"] and corners[-1] == at["base"]
    assert corners[1] == (at["good"][0], at["small"][1]), "until the next is reached, the best is the one before"


def test_a_faster_front_steps_the_other_way() -> None:
    chart = scatter([dot(100, 0.5, "fast"), dot(10, 0.9, "slow")], "tokens/s", "accuracy", x_better=1, y_better=1, ring="", share=True)
    (line,) = ElementTree.fromstring(chart).findall("polyline")
    (x1, y1), corner, (x2, y2) = (tuple(map(float, p.split(","))) for p in (line.get("points") or "").split())
    assert corner == (x1, y2) and x1 < x2 and y1 < y2


def test_of_a_crowd_only_the_front_is_named() -> None:
    def named(count: int) -> int:
        dots = [dot(n, 1 + n % 7, f"stage{n}") for n in range(count)]
        chart = scatter(dots, "x", "y", x_better=-1, y_better=1, ring="stage0")
        assert len(re.findall("<title>stage", chart)) == count
        return len(re.findall(">stage[0-9]+</text>", chart))

    assert named(10) == 10 and named(100) == 7


def test_no_name_lies_on_another() -> None:
    dots = [dot(1 + n / 1000, 0.5, f"a long name {n}") for n in range(20)]
    chart = ElementTree.fromstring(scatter(dots, "x", "y", x_better=-1, y_better=1, ring=""))
    boxes = []
    for text in (t for t in chart.findall("text") if "long" in (t.text or "")):
        long, x, y = 6.6 * len(text.text or ""), float(text.get("x", "")), float(text.get("y", ""))
        start = x - {"start": 0, "middle": long / 2, "end": long}[text.get("text-anchor", "")]
        boxes.append((start, start + long, y))
    assert len(boxes) > 3
    assert not any(a[0] < b[1] and b[0] < a[1] and abs(a[2] - b[2]) < 13 for n, a in enumerate(boxes) for b in boxes[:n])


def test_curves_are_where_their_points_are() -> None:
    chart = ElementTree.fromstring(curves({"loss": [(0, 4.0), (50, 2.0), (100, 1.0)], "kd": [(0, 1.0), (100, 1.0)]}, "step", "loss"))
    loss, kd = ([tuple(map(float, p.split(","))) for p in (line.get("points") or "").split()] for line in chart.findall("polyline"))
    assert loss[1][0] - loss[0][0] == pytest.approx(loss[2][0] - loss[1][0], abs=0.11)
    assert loss[1][1] - loss[0][1] == pytest.approx(2 * (loss[2][1] - loss[1][1]), abs=0.2)
    assert kd[0][1] == kd[1][1] == loss[2][1]


def test_what_failed_is_drawn_but_no_part_of_the_front() -> None:
    dots = [Dot(1, 9, "failed", 9, 9, failed=True), Dot(2, 5, "small", 5, 5), Dot(3, 8, "good", 8, 8)]
    assert [dot.name for dot in front(dots, -1, 1)] == ["small", "good"]
    svg = scatter(dots, "size", "accuracy", x_better=-1, y_better=1, ring="")
    assert svg.count("<circle") == 3 and "failed (failed): accuracy 9" in svg
