"""Expand `matrix:` of a recipe from lists of values to cells; flows/planning/graph.py applies the cells to the graph.

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
from functools import cached_property
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from compression.errors import nearest
from compression.settings import Settings
from flows.planning.source_map import KeyPath, SourceMap, dotted

SEED: KeyPath = ("seed",)
_MAX_CELLS = 10_000
_NOT_IN_IDENTITY = {"retries", "timeout", "bounds"}  # keys of a stage's entry that do not change its bytes
_MAX_LABEL, _MAX_NAME = 32, 160  # characters of a value's label, and of a stage's or cell's name: file names end at 255


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
        description="Cells to extend or add, after `exclude`: an entry extends every cell whose values it does not change; where there is none, it becomes a cell.",
    )

    def lists(self) -> dict[str, list[Any]]:
        """Return the values by key, as the recipe gives them."""
        return ({"seed": self.seed} if self.seed else {}) | dict(self.__pydantic_extra__)


@dataclass(frozen=True)
class Value:
    """One value of one key.

    text   canonical JSON: equal for equal values
    label  its form in names: a few characters that are safe in file names
    place  its key path in the recipe
    """

    value: Any
    text: str
    label: str
    place: KeyPath


@dataclass(frozen=True)
class Cell:
    """A choice of values by the path of what they replace: ("stages", "distill", "temperature") or ("seed",)."""

    values: Mapping[KeyPath, Value]
    short_keys: Mapping[KeyPath, str]  # in names of stages

    @property
    def name(self) -> str:
        return self.label(self.values)

    def label(self, paths: Iterable[KeyPath]) -> str:
        """Write the values of these paths as text, `temperature=2,bits=4`; a text too long for a file name is cut and gets a digest."""
        text = ",".join(f"{self.short_keys[path]}={self.values[path].label}" for path in paths)
        return text if len(text) <= _MAX_NAME else f"{text[: _MAX_NAME - 9]}-{_digest(text)}"


def key_of(path: KeyPath) -> str:
    """Write a path as a key of the matrix: `distill.temperature`."""
    return dotted(path[1:] if path[0] == "stages" else path)


def expand_matrix(matrix: Matrix | None, stages: Iterable[str], source: SourceMap) -> list[Cell]:
    """Return every cell in the order of the lists, the last one fastest. Without a matrix there is one cell, which replaces nothing.

    Raises:
        EdgepressError: With file, line and key: a stage is unknown, a key is given twice, lists cannot go side by side, an `exclude` matches
            nothing.
    """
    if matrix is None:
        return [Cell({}, {})]
    expansion = _Expansion(matrix, list(stages), source)
    choices = expansion.include(expansion.exclude(expansion.product()))
    if not choices:
        message = "`exclude` leaves no cell" if expansion.lists else "it has neither lists of values nor `include`"
        raise source.error(("matrix",), message)
    _check_labels(choices, source)
    paths = dict.fromkeys(path for choice in choices for path in choice)  # in one order, so that equal cells get equal names
    short = short_names(map(key_of, paths))
    short_keys = {path: short[key_of(path)] for path in paths}
    return [Cell({path: choice[path] for path in paths if path in choice}, short_keys) for choice in choices]


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Map each key to its last part where no other key ends so, else to itself."""
    ends = {key: key.rpartition(".")[2] for key in keys}
    counts = Counter(ends.values())
    return {key: end if counts[end] == 1 else key for key, end in ends.items()}


Choice = dict[KeyPath, Value]


@dataclass(frozen=True)
class _Expansion:
    """A matrix with the names of the recipe's stages, to which its keys refer."""

    matrix: Matrix
    stages: list[str]
    source: SourceMap

    @cached_property
    def lists(self) -> dict[KeyPath, list[Value]]:
        lists: dict[KeyPath, list[Value]] = {}
        for key, values in self.matrix.lists().items():
            path = self._path(key, ("matrix", key))
            if path in lists:
                raise self.source.error(("matrix", key), f"{key_of(path)} stands twice in the matrix")
            lists[path] = [_value(value, ("matrix", key, number)) for number, value in enumerate(values)]
        return lists

    def product(self) -> list[Choice]:
        """Combine the lists; those of one group go side by side."""
        groups = self._groups()
        count = math.prod(len(self.lists[group[0]]) for group in groups)
        if count > _MAX_CELLS:
            raise self.source.error(("matrix",), f"the product of these lists has {count:,} cells; the most is {_MAX_CELLS:,}")
        rows = [[dict(zip(group, row, strict=True)) for row in zip(*(self.lists[path] for path in group), strict=True)] for group in groups]
        combined = [dict(pair for part in parts for pair in part.items()) for parts in itertools.product(*rows)] if rows else []
        return [{path: choice[path] for path in self.lists} for choice in combined]

    def exclude(self, choices: list[Choice]) -> list[Choice]:
        remaining = choices
        for number, entry in enumerate(self.matrix.exclude):
            place: KeyPath = ("matrix", "exclude", number)
            unwanted = {self._listed_path(key, (*place, key)): value for key, value in entry.items()}
            if not any(_agree(choice, unwanted) for choice in choices):
                raise self.source.error(place, f"no cell has {_format_values(entry)}")
            remaining = [choice for choice in remaining if not _agree(choice, unwanted)]
        return remaining

    def include(self, choices: list[Choice]) -> list[Choice]:
        """Extend or add cells as GitHub Actions does: an entry may overwrite what an earlier entry added, never a value of the lists."""
        extended, added = [dict(choice) for choice in choices], []
        for number, entry in enumerate(self.matrix.include):
            place: KeyPath = ("matrix", "include", number)
            extra: Choice = {}
            for key, value in entry.items():
                path = self._path(key, (*place, key))
                if path in extra:
                    raise self.source.error((*place, key), f"{key_of(path)} stands twice in this entry")
                extra[path] = _value(value, (*place, key))
            listed = {path: value.value for path, value in extra.items() if path in self.lists}
            matching = [choice for choice in extended if _agree(choice, listed)]
            for choice in matching:
                choice |= {path: value for path, value in extra.items() if path not in self.lists}
            if not matching:
                added.append(extra)
        return extended + added

    def _groups(self) -> list[list[KeyPath]]:
        """The keys that go side by side; any other key is a group alone."""
        if self.matrix.zip is True:
            zipped = [list(self.lists)] if self.lists else []
        else:
            zipped = [
                [self._listed_path(key, ("matrix", "zip", i, j)) for j, key in enumerate(group)]
                for i, group in enumerate(self.matrix.zip or [])
            ]
        counts = Counter(path for group in zipped for path in group)
        for path, count in counts.items():
            if count > 1:
                raise self.source.error(("matrix", "zip"), f"{key_of(path)} stands {count} times in `zip`")
        for group in zipped:
            lengths = {key_of(path): len(self.lists[path]) for path in group}
            if len(set(lengths.values())) > 1:
                raise self.source.error(
                    ("matrix", "zip"), f"lists that go side by side must have the same length, and these do not: {_format_values(lengths)}"
                )
        return [*zipped, *([path] for path in self.lists if path not in counts)]

    def _listed_path(self, key: str, place: KeyPath) -> KeyPath:
        path = self._path(key, place)
        if path not in self.lists:
            raise self.source.error(
                place, f"{key} has no list in the matrix; keys with one: {', '.join(map(key_of, self.lists)) or 'none'}"
            )
        return path

    def _path(self, key: str, place: KeyPath) -> KeyPath:
        """The path that a key of the matrix replaces. A stage's name may contain dots: the longest name that fits wins."""
        if key == "seed":
            return SEED
        for text in (key, key.removeprefix("stages.")):
            fitting = [stage for stage in self.stages if text.startswith(f"{stage}.")]
            if fitting:
                stage = max(fitting, key=len)
                parameter = text[len(stage) + 1 :].split(".")
                if parameter[0] in _NOT_IN_IDENTITY:
                    raise self.source.error(
                        place,
                        f"{parameter[0]} does not change the result, so there is nothing to compare; sweep parameters, `needs` or `uses`",
                    )
                return ("stages", stage, *parameter)
        stage = key.removeprefix("stages.").partition(".")[0]
        raise self.source.error(
            place,
            f"a key here is `seed` or <stage>.<parameter>, and this names no stage{nearest(stage, self.stages)}; "
            f"stages: {', '.join(self.stages)}",
        )


def _value(value: Any, place: KeyPath) -> Value:
    text = json.dumps(value, sort_keys=True, default=str)
    plain = value if isinstance(value, str) else text
    label = re.sub(r"[^\w.+-]+", "-", plain, flags=re.ASCII).strip("-.") or "empty"
    if label != plain or len(label) > _MAX_LABEL:  # the digest keeps values apart that differ only in what the label leaves out
        label = f"{label[: _MAX_LABEL - 9]}-{_digest(text)}"
    return Value(value, text, label, place)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _agree(choice: Choice, values: Mapping[KeyPath, Any]) -> bool:
    return all(path in choice and choice[path].value == value for path, value in values.items())


def _check_labels(choices: list[Choice], source: SourceMap) -> None:
    """Refuse 2 beside "2": names are made of labels."""
    seen: dict[tuple[KeyPath, str], Value] = {}
    for path, value in (pair for choice in choices for pair in choice.items()):
        other = seen.setdefault((path, value.label), value)
        if other.text != value.text:
            raise source.error(value.place, f"{value.text} looks like {other.text} in names; write both in one way")


def _format_values(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
