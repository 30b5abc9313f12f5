import re
from xml.etree import ElementTree

import pytest

from flows.charts import COLOURS, Point, axis, legend, lines, scatter


@pytest.mark.parametrize("values", [[0.9, 0.9], [0.2, 0.95], [1e-5, 3e-5], [58.7, 59.3], [3.0, 4000.0], [0.0, 0.0], [7.0]])
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
    assert legend(list(series)) == legend(["one"]) == ""
    assert re.findall("#[0-9a-f]{6}", legend(["one", "two"])) == list(COLOURS[:2])


def test_a_crowd_has_its_names_as_tooltips_only() -> None:
    few, many = ([(float(n), float(n), f"stage{n}") for n in range(count)] for count in (10, 100))
    assert len(re.findall(">stage[0-9]+</text>", scatter(few, "x", "y", "stage0"))) == 10
    crowd = scatter(many, "x", "y", "stage0")
    assert len(re.findall("<title>stage", crowd)) == 100 and ">stage" not in crowd.replace("<title>stage", "")
