"""The cells of a sweep side by side: what each one's results measured, and which value of each metric is the best. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flows.planning.matrix import short_names
from tasks.measurement.figures import Figure, measured


@dataclass
class Line:
    """One result of one cell.

    values  as text, one for each key; empty where the recipe's own value holds
    leaf    the stage's name in the recipe
    row     the stage's row of the summary
    best    metrics in which no other cell's result of this leaf is better; of a failed one none
    """

    values: tuple[str, ...]
    leaf: str
    row: dict[str, Any]
    best: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Comparison:
    """Every result of every cell, in the order of the cells. `keys` are short where that is clear."""

    keys: tuple[str, ...]
    leaves: tuple[str, ...]
    lines: tuple[Line, ...]

    def measured(self) -> list[Figure]:
        """What was measured, of that of which one value is better than another, and the error of the accuracy."""
        found = measured(line.row["metrics"] for line in self.lines)
        return [figure for figure in found if figure.better or figure.metric == "accuracy_stderr"]


def compare(summary: dict[str, Any]) -> Comparison:
    """The comparison of a summary (flows/run/pipeline.py) whose recipe has a matrix."""
    sweep, rows = summary["sweep"], {row["stage"]: row for row in summary["rows"]}
    lines = [
        Line(tuple(_text(cell["values"], key) for key in sweep["keys"]), leaf, rows[name])
        for cell in sweep["cells"]
        for leaf, name in cell["leaves"].items()
    ]
    leaves = tuple(dict.fromkeys(line.leaf for line in lines))
    for leaf in leaves:
        _mark([line for line in lines if line.leaf == leaf])
    short = short_names(sweep["keys"])
    return Comparison(tuple(short[key] for key in sweep["keys"]), leaves, tuple(lines))


def _text(values: dict[str, Any], key: str) -> str:
    return str(values[key]) if key in values else ""


def _mark(lines: Sequence[Line]) -> None:
    """Mark the best values of each metric among what did not fail; none where all are equal."""
    held = [line for line in lines if line.row["state"] != "Failed"]
    for figure in (one for one in measured(line.row["metrics"] for line in held) if one.better):
        metric = figure.metric
        found = {line.row["metrics"][metric] for line in held if metric in line.row["metrics"]}
        if len(found) > 1:
            best = max(found) if figure.better > 0 else min(found)
            for line in held:
                if line.row["metrics"].get(metric) == best:
                    line.best.add(metric)
