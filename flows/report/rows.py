"""What the sections of the report ask of the rows of a summary: parents, leaves, and which of many stages to show. Imports no torch."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from flows.report.charts import Dot, front
from tasks.ancestry import walk_ancestors
from tasks.measurement.figures import FIGURES, Figure, noise

Row = dict[str, Any]
MANY = 40  # stages: from here on a page shows the best of a sweep, and folds the rest away
_SHOWN = 8


def origin(stage: str) -> str:
    """The stage's name in the recipe: that of a sweep's copy without its values."""
    return stage.partition("@")[0]


def values(stage: str) -> list[str]:
    """The values of a sweep that a copy's name tells: `gptq@keep=0.5,bits=4` has `keep=0.5` and `bits=4`."""
    swept = stage.partition("@")[2]
    return swept.split(",") if swept else []


def beside(stage: str, other: str | None) -> str:
    """The stage's name without the values that the other's tells already."""
    known = values(other or "")
    own = [value for value in values(stage) if value not in known]
    return f"{origin(stage)}@{','.join(own)}" if own else origin(stage)


def parent(row: Row) -> str | None:
    """The stage whose checkpoint this one took; None for the base."""
    return row["needs"][0] if row["needs"] else None


def leaves(rows: Sequence[Row]) -> list[Row]:
    """Stages that nothing follows."""
    needed = {name for row in rows for name in row["needs"]}
    return [row for row in rows if row["stage"] not in needed]


def with_ancestors(rows: Sequence[Row], wanted: Iterable[Row]) -> list[Row]:
    """The rows on the way from the base to those wanted, each from its parent, in the order of the run."""
    parents = {row["stage"]: row["needs"][:1] for row in rows}
    found = set(walk_ancestors((row["stage"] for row in wanted), lambda name: parents.get(name, [])))
    return [row for row in rows if row["stage"] in found]


def quality(rows: Iterable[Row]) -> Figure:
    """What the charts take for quality: accuracy, perplexity where none was measured."""
    found = {metric for row in rows for metric in row["metrics"]}
    return next(figure for figure in FIGURES if figure.metric == ("accuracy" if "accuracy" in found else "perplexity"))


def dots(rows: Sequence[Row], cost: str, *, group: str = "runtime") -> list[Dot]:
    """Quality over a cost, with whiskers where noise is known, of every row that has both. The copies of a sweep are labelled by their values."""
    y = quality(rows).metric
    swept = len({origin(row["stage"]) for row in rows if values(row["stage"])})
    found = []
    for row in rows:
        metrics = row["metrics"]
        if cost in metrics and y in metrics:
            low, high = noise(metrics, y) or (metrics[y], metrics[y])
            told = ", ".join(value.rpartition("=")[2] for value in values(row["stage"]))
            label = told if swept == 1 else f"{origin(row['stage'])} {told}".rstrip()
            found.append(Dot(metrics[cost], metrics[y], row["stage"], low, high, row.get(group) or "", label, row["state"] == "Failed"))
    return found


def shown(rows: Sequence[Row]) -> list[Row]:
    """The rows that are looked at one by one: all, or of many the paths to the leaves that no other beats in quality and size, or speed."""
    if len(rows) <= MANY:
        return list(rows)
    ends, better = leaves(rows), quality(rows)
    best = Counter(
        dot.name
        for cost, direction in (("size_mb", -1), ("tokens_per_second", 1))
        for dot in front(dots(ends, cost), direction, better.better)
    )
    ordered = sorted(
        (row for row in ends if row["stage"] in best), key=lambda row: (-best[row["stage"]], -better.better * row["metrics"][better.metric])
    )
    return with_ancestors(rows, ordered[:_SHOWN] or ends[:_SHOWN])
