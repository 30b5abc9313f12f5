"""`matrix:` of a recipe: which values of which parameters are tried. From lists to cells; what a cell does to the graph is flows/planning/graph.py's matter.

A cell is one choice of values. Lists make their product, or go side by side (`zip`); then `exclude` takes cells away and `include` extends or adds
some, both as in GitHub Actions.
"""

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from compression.settings import Settings
from flows.planning.source_map import KeyPath, SourceMap, dotted, nearest

MOST_CELLS = 10_000
SEED: KeyPath = ("seed",)
_UNSWEPT = {"retries", "timeout", "bounds"}  # of a stage's entry: they decide no bytes
_LABEL, _NAME = 32, 160  # longest label of a value, and name of a stage or cell: file names end at 255


class Matrix(Settings):
    """Every further key is a parameter of a stage, `<stage>.<parameter>`, with the list of its values. Several lists make a product."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Annotated[list[Any], Field(min_length=1)]]

    seed: list[Annotated[int, Field(ge=0)]] | None = Field(
        default=None, min_length=1, description="Values of the recipe's seed: every stage is computed with each."
    )
    zip: bool | list[Annotated[list[str], Field(min_length=2)]] = Field(
        default=False, description="Lists that go side by side instead of making a product: `true` for all, or groups of keys."
    )
    exclude: list[Annotated[dict[str, Any], Field(min_length=1)]] = Field(
        default_factory=list, description="Cells to leave out: each entry takes away all that have its values."
    )
    include: list[Annotated[dict[str, Any], Field(min_length=1)]] = Field(
        default_factory=list,
        description="Cells to extend or add, after `exclude`: an entry joins every cell whose values it leaves as they are, or else is one of its own.",
    )

    def lists(self) -> dict[str, list[Any]]:
        """The values by key, as the recipe gives them."""
        return ({"seed": self.seed} if self.seed else {}) | dict(self.__pydantic_extra__)


@dataclass(frozen=True)
class Value:
    """One value of one key.

    text   canonical JSON: equal for equal values
    label  what names say of it: a few characters that are safe in file names
    place  where it stands in the recipe
    """

    value: Any
    text: str
    label: str
    place: KeyPath


@dataclass(frozen=True)
class Cell:
    """A choice of values by the path of what they replace: ("stages", "distill", "temperature") or ("seed",)."""

    values: Mapping[KeyPath, Value]
    shown: Mapping[KeyPath, str]  # the name of each key in names of stages

    @property
    def name(self) -> str:
        return self.label(self.values)

    def label(self, paths: Iterable[KeyPath]) -> str:
        """The named values as text, `temperature=2,bits=4`; cut where it is too long for a file name."""
        text = ",".join(f"{self.shown[path]}={self.values[path].label}" for path in paths)
        return text if len(text) <= _NAME else f"{text[: _NAME - 9]}-{_digest(text)}"


def key_of(path: KeyPath) -> str:
    """How a path is written in the matrix: `distill.temperature`."""
    return dotted(path[1:] if path[0] == "stages" else path)


def cells_of(matrix: Matrix | None, stages: Iterable[str], source: SourceMap) -> list[Cell]:
    """Every cell in the order of the lists, the last one fastest. Without a matrix it is one, which replaces nothing.

    Raises EdgepressError with file, line and key: an unknown stage, a key given twice, lists that cannot go side by side, an `exclude` that matches nothing.
    """
    if matrix is None:
        return [Cell({}, {})]
    names = list(stages)
    lists = _lists(matrix, names, source)
    cells = _combinations(matrix, lists, names, source)
    cells = _excluded(matrix, cells, lists, names, source)
    cells = _included(matrix, cells, lists, names, source)
    if not cells:
        message = "`exclude` leaves no cell" if lists else "it has neither lists of values nor `include`"
        raise source.error(("matrix",), message)
    _check_labels(cells, source)
    paths = dict.fromkeys(path for cell in cells for path in cell)
    short = short_names(map(key_of, paths))
    shown = {path: short[key_of(path)] for path in paths}
    return [Cell({path: cell[path] for path in paths if path in cell}, shown) for cell in cells]  # in one order, for names to be equal


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """The last part of each key, where it is the only one that ends so; else the whole key."""
    ends = {key: key.rpartition(".")[2] for key in keys}
    times = Counter(ends.values())
    return {key: end if times[end] == 1 else key for key, end in ends.items()}


Choice = dict[KeyPath, Value]


def _lists(matrix: Matrix, stages: list[str], source: SourceMap) -> dict[KeyPath, list[Value]]:
    lists: dict[KeyPath, list[Value]] = {}
    for key, values in matrix.lists().items():
        path = _path(key, ("matrix", key), stages, source)
        if path in lists:
            raise source.error(("matrix", key), f"{key_of(path)} stands twice in the matrix")
        lists[path] = [_value(value, ("matrix", key, number)) for number, value in enumerate(values)]
    return lists


def _path(key: str, place: KeyPath, stages: list[str], source: SourceMap) -> KeyPath:
    """The path of what a key replaces. A stage's name may have dots: the longest name that fits is meant."""
    if key == "seed":
        return SEED
    for text in (key, key.removeprefix("stages.")):
        fitting = [stage for stage in stages if text.startswith(f"{stage}.")]
        if fitting:
            stage = max(fitting, key=len)
            parameter = text[len(stage) + 1 :].split(".")
            if parameter[0] in _UNSWEPT:
                raise source.error(
                    place, f"{parameter[0]} decides no bytes, so there is nothing to compare; sweep parameters, `needs` or `uses`"
                )
            return ("stages", stage, *parameter)
    stage = key.removeprefix("stages.").partition(".")[0]
    raise source.error(
        place, f"a key here is `seed` or <stage>.<parameter>, and this names no stage{nearest(stage, stages)}; stages: {', '.join(stages)}"
    )


def _value(value: Any, place: KeyPath) -> Value:
    text = json.dumps(value, sort_keys=True, default=str)
    plain = value if isinstance(value, str) else text
    label = re.sub(r"[^\w.+-]+", "-", plain, flags=re.ASCII).strip("-.") or "empty"
    if label != plain or len(label) > _LABEL:  # what was left out must not make two values one
        label = f"{label[: _LABEL - 9]}-{_digest(text)}"
    return Value(value, text, label, place)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _combinations(matrix: Matrix, lists: dict[KeyPath, list[Value]], stages: list[str], source: SourceMap) -> list[Choice]:
    groups = _groups(matrix, lists, stages, source)
    count = math.prod(len(lists[group[0]]) for group in groups)
    if count > MOST_CELLS:
        raise source.error(("matrix",), f"the product of these lists has {count:,} cells; the most is {MOST_CELLS:,}")
    sides = [[dict(zip(group, row, strict=True)) for row in zip(*(lists[path] for path in group), strict=True)] for group in groups]
    chosen = [dict(pair for part in parts for pair in part.items()) for parts in itertools.product(*sides)] if sides else []
    return [{path: choice[path] for path in lists} for choice in chosen]


def _groups(matrix: Matrix, lists: dict[KeyPath, list[Value]], stages: list[str], source: SourceMap) -> list[list[KeyPath]]:
    """The keys that go side by side; a key that makes a product is a group of its own."""
    if matrix.zip is True:
        zipped = [list(lists)] if lists else []
    else:
        keys = matrix.zip or []
        zipped = [
            [_listed(key, ("matrix", "zip", i, j), lists, stages, source) for j, key in enumerate(group)] for i, group in enumerate(keys)
        ]
    times = Counter(path for group in zipped for path in group)
    for path, number in times.items():
        if number > 1:
            raise source.error(("matrix", "zip"), f"{key_of(path)} stands {number} times in `zip`")
    for group in zipped:
        lengths = {key_of(path): len(lists[path]) for path in group}
        if len(set(lengths.values())) > 1:
            raise source.error(
                ("matrix", "zip"), f"lists that go side by side are of one length, and these are not: {_format_values(lengths)}"
            )
    return [*zipped, *([path] for path in lists if path not in times)]


def _listed(key: str, place: KeyPath, lists: dict[KeyPath, list[Value]], stages: list[str], source: SourceMap) -> KeyPath:
    path = _path(key, place, stages, source)
    if path not in lists:
        raise source.error(place, f"{key} has no list in the matrix; keys with one: {', '.join(map(key_of, lists)) or 'none'}")
    return path


def _excluded(matrix: Matrix, cells: list[Choice], lists: dict[KeyPath, list[Value]], stages: list[str], source: SourceMap) -> list[Choice]:
    left = cells
    for number, entry in enumerate(matrix.exclude):
        place: KeyPath = ("matrix", "exclude", number)
        unwanted = {_listed(key, (*place, key), lists, stages, source): value for key, value in entry.items()}
        if not any(_agree(cell, unwanted) for cell in cells):
            raise source.error(place, f"no cell has {_format_values(entry)}")
        left = [cell for cell in left if not _agree(cell, unwanted)]
    return left


def _included(matrix: Matrix, cells: list[Choice], lists: dict[KeyPath, list[Value]], stages: list[str], source: SourceMap) -> list[Choice]:
    """As in GitHub Actions: an entry may overwrite what an earlier entry added, never a value of the lists."""
    extended, added = [dict(cell) for cell in cells], []
    for number, entry in enumerate(matrix.include):
        place: KeyPath = ("matrix", "include", number)
        extra: Choice = {}
        for key, value in entry.items():
            path = _path(key, (*place, key), stages, source)
            if path in extra:
                raise source.error((*place, key), f"{key_of(path)} stands twice in this entry")
            extra[path] = _value(value, (*place, key))
        joined = [cell for cell in extended if _agree(cell, {path: v.value for path, v in extra.items() if path in lists})]
        for cell in joined:
            cell |= {path: value for path, value in extra.items() if path not in lists}
        if not joined:
            added.append(extra)
    return extended + added


def _agree(cell: Choice, values: Mapping[KeyPath, Any]) -> bool:
    return all(path in cell and cell[path].value == value for path, value in values.items())


def _check_labels(cells: list[Choice], source: SourceMap) -> None:
    """Names are made of labels: 2 and "2" cannot stand side by side."""
    seen: dict[tuple[KeyPath, str], Value] = {}
    for path, value in (pair for cell in cells for pair in cell.items()):
        other = seen.setdefault((path, value.label), value)
        if other.text != value.text:
            raise source.error(value.place, f"{value.text} looks like {other.text} in names; write both in one way")


def _format_values(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
