"""YAML that remembers on which line each key stands, so that an error can point to it."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from pathlib import Path
from typing import Any

import yaml

from compression.errors import EdgepressError

KeyPath = tuple[str | int, ...]
_MOST_PLACES = 100_000  # values in a recipe, aliases written out; those of a few lines can stand for billions
_TAG = "tag:yaml.org,2002:"
_NO_KEYS = {f"{_TAG}bool": "truth value", f"{_TAG}float": "number", f"{_TAG}timestamp": "date", f"{_TAG}null": "null"}  # an int may be one


def dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


@dataclass(frozen=True)
class SourceMap:
    """A parsed document and the line (from 1) of every key path in it.

    text   the document as it was read
    moved  where a value was given elsewhere in the file: of a key path, the path that it was read from
    """

    file: Path
    value: Any
    lines: dict[KeyPath, int] = field(repr=False)
    text: str = field(default="", repr=False)
    moved: Mapping[KeyPath, KeyPath] = field(default_factory=dict, repr=False)

    def where(self, path: KeyPath) -> str:
        """`file:line` of a key path, or of its nearest ancestor that stands in the file."""
        path = self._origin(path)
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.file}:{self.lines.get(path, 1)}"

    def error(self, path: KeyPath, message: str) -> EdgepressError:
        """`file:line: key: message`, of the key as it stands in the file."""
        return EdgepressError(f"{self.where(path)}: {dotted(self._origin(path))}: {message}")

    def remap(self, moved: Mapping[KeyPath, KeyPath]) -> "SourceMap":
        return replace(self, moved=moved)

    def _origin(self, path: KeyPath) -> KeyPath:
        for length in range(len(path), 0, -1):
            if path[:length] in self.moved:
                return (*self.moved[path[:length]], *path[length:])
        within = (place for moved, place in self.moved.items() if moved[: len(path)] == path and path not in self.lines)
        return next(within, path)


def read_yaml(file: Path, text: str | None = None) -> SourceMap:
    """Parse one YAML document: the file's, or `text` that stood in it.

    Raises EdgepressError for a missing file, wrong syntax, a key that is given twice or is no text, aliases that never end.
    """
    try:
        text = file.read_text(encoding="utf-8") if text is None else text
        root, value = _parsed(text)
    except FileNotFoundError:
        raise EdgepressError(f"there is no recipe {shortened(str(file))}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is not UTF-8 ({error})"
        raise EdgepressError(f"{shortened(str(file))} cannot be read: {reason}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise EdgepressError(f"{file}:{line}: not YAML: {getattr(error, 'problem', error)}") from None
    if root is None:
        raise EdgepressError(f"{file}: the recipe is empty")
    lines: dict[KeyPath, int] = {}
    _locate(root, (), lines, file, ())
    return SourceMap(file, value, lines, text)


def read_value(text: str) -> Any:
    """The value of a text in YAML. Raises ValueError with the reason where it is none."""
    try:
        return _parsed(text)[1]
    except yaml.YAMLError as error:
        raise ValueError(f"the value is not YAML: {getattr(error, 'problem', error)}") from None


class _Loader(yaml.SafeLoader):
    """SafeLoader whose every error is a YAMLError with its place: PyYAML lets `2026-13-45` and `!!int x` end in errors of Python's own."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
            problem = f"{shortened(str(node.value))!r} is no {node.tag.rpartition(':')[2]} ({error}); put quotes round a text"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


def _parsed(text: str) -> tuple[yaml.Node | None, Any]:
    """The tree of a document and its value. Raises YAMLError."""
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader), yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("brackets are nested too deep") from None


def _locate(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], file: Path, above: tuple[yaml.Node, ...]) -> None:
    """Take down the line of every key path below a node. `above`: the nodes that it is in."""
    lines.setdefault(path, node.start_mark.line + 1)
    if any(node is other for other in above):
        raise EdgepressError(f"{file}:{node.start_mark.line + 1}: {dotted(path)}: this contains itself, by an alias; write the value out")
    if len(lines) > _MOST_PLACES:
        raise EdgepressError(f"{file}: its aliases make more than {_MOST_PLACES:,} values of it; write out those that are meant")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if kind := _NO_KEYS.get(key.tag):
                raise EdgepressError(
                    f"{file}:{key.start_mark.line + 1}: {dotted((*path, key.value))}: the key {key.value} is a {kind} in YAML, and keys are texts; "
                    f"put quotes round it: {key.value!r}"
                )
            here = (*path, yaml.safe_load(key.value) if key.tag == f"{_TAG}int" else key.value)
            if here in lines:
                raise EdgepressError(f"{file}:{key.start_mark.line + 1}: the key {key.value!r} stands twice (first on line {lines[here]})")
            lines[here] = key.start_mark.line + 1
            _locate(value, here, lines, file, (*above, node))
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            _locate(value, (*path, number), lines, file, (*above, node))


def kind_of(value: object) -> str | None:
    """What YAML made of a scalar where a text was meant: "truth value" for `on`, "date" for `2026-01-01`; None of a text or a collection."""
    names = {
        bool: "truth value (as are on, off, yes and no)",
        int: "number",
        float: "number",
        date: "date",
        datetime: "date",
        type(None): "null",
    }
    return names.get(type(value))


def shortened(text: str, length: int = 80) -> str:
    """A text for a message: of a very long one the beginning."""
    return text if len(text) <= length else f"{text[:length]}... ({len(text)} characters)"


def nearest(word: str, known: Iterable[str]) -> str:
    """What was probably meant, as the end of a message; empty where nothing known is like it."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
