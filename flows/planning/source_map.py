"""Read YAML and remember the line of every key, so that an error can point to it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from pathlib import Path
from typing import Any

import yaml

from compression.errors import EdgepressError

KeyPath = tuple[str | int, ...]
_MAX_PLACES = 100_000  # values in a recipe, aliases written out; those of a few lines can stand for billions
_TAG = "tag:yaml.org,2002:"
_NOT_TEXT = {
    f"{_TAG}bool": "truth value",
    f"{_TAG}float": "number",
    f"{_TAG}timestamp": "date",
    f"{_TAG}null": "null",
}  # keys; an int may be one


def dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


@dataclass(frozen=True)
class SourceMap:
    """A parsed document and the line (from 1) of every key path in it.

    text       the document as it was read
    redirects  key paths whose values stand elsewhere in the file (those of a matrix), with the paths they were read from
    """

    file: Path
    value: Any
    lines: dict[KeyPath, int] = field(repr=False)
    text: str = field(default="", repr=False)
    redirects: Mapping[KeyPath, KeyPath] = field(default_factory=dict, repr=False)

    def position(self, path: KeyPath) -> str:
        """Return `file:line` of a key path, or of its nearest ancestor in the file."""
        path = self._origin(path)
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.file}:{self.lines.get(path, 1)}"

    def error(self, path: KeyPath, message: str) -> EdgepressError:
        """Return an error `file:line: key: message`, with the key as it stands in the file."""
        return EdgepressError(f"{self.position(path)}: {dotted(self._origin(path))}: {message}")

    def remap(self, redirects: Mapping[KeyPath, KeyPath]) -> "SourceMap":
        return replace(self, redirects=redirects)

    def _origin(self, path: KeyPath) -> KeyPath:
        for length in range(len(path), 0, -1):
            if path[:length] in self.redirects:
                return (*self.redirects[path[:length]], *path[length:])
        below = (origin for target, origin in self.redirects.items() if target[: len(path)] == path and path not in self.lines)
        return next(below, path)


def read_yaml(file: Path, text: str | None = None) -> SourceMap:
    """Parse one YAML document: the file's, or `text` that stood in it.

    Raises:
        EdgepressError: The file is missing, its syntax is wrong, a key stands twice or is not a text, or aliases never end.
    """
    try:
        text = file.read_text(encoding="utf-8") if text is None else text
        root, value = _parse(text)
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
    _record_lines(root, (), lines, file, ())
    return SourceMap(file, value, lines, text)


def read_value(text: str) -> Any:
    """Parse a YAML value. Raises ValueError with the reason where the text is not YAML."""
    try:
        return _parse(text)[1]
    except yaml.YAMLError as error:
        raise ValueError(f"the value is not YAML: {getattr(error, 'problem', error)}") from None


class _Loader(yaml.SafeLoader):
    """Turn every error into a YAMLError with its position: for `2026-13-45` and `!!int x` PyYAML raises Python's ValueError."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
            problem = f"{shortened(str(node.value))!r} is not a valid {node.tag.rpartition(':')[2]} ({error}); put quotes round a text"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


def _parse(text: str) -> tuple[yaml.Node | None, Any]:
    """Return the tree of a document and its value. Raises YAMLError."""
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader), yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("brackets are nested too deep") from None


def _record_lines(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], file: Path, parents: tuple[yaml.Node, ...]) -> None:
    """Add the line of every key path below a node to `lines`."""
    lines.setdefault(path, node.start_mark.line + 1)
    if any(node is parent for parent in parents):
        raise EdgepressError(f"{file}:{node.start_mark.line + 1}: {dotted(path)}: this contains itself, by an alias; write the value out")
    if len(lines) > _MAX_PLACES:
        raise EdgepressError(f"{file}: its aliases make more than {_MAX_PLACES:,} values of it; write out those that are meant")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line = key.start_mark.line + 1
            if kind := _NOT_TEXT.get(key.tag):
                raise EdgepressError(
                    f"{file}:{line}: {dotted((*path, key.value))}: the key {key.value} is a {kind} in YAML, and keys are texts; "
                    f"put quotes round it: {key.value!r}"
                )
            key_path = (*path, yaml.safe_load(key.value) if key.tag == f"{_TAG}int" else key.value)
            if key_path in lines:
                raise EdgepressError(f"{file}:{line}: the key {key.value!r} stands twice (first on line {lines[key_path]})")
            lines[key_path] = line
            _record_lines(value, key_path, lines, file, (*parents, node))
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            _record_lines(value, (*path, number), lines, file, (*parents, node))


def yaml_type(value: object) -> str | None:
    """Name what YAML made of an unquoted text: "truth value" for `on`, "date" for `2026-01-01`; None for a text or a collection."""
    names = {
        bool: "truth value (as are on, off, yes and no)", int: "number", float: "number", date: "date", datetime: "date", type(None): "null",
    }  # fmt: skip
    return names.get(type(value))


def shortened(text: str, length: int = 80) -> str:
    """Cut a long text for a message, and say how long it is."""
    return text if len(text) <= length else f"{text[:length]}... ({len(text)} characters)"
