"""YAML that remembers on which line each key stands, so that an error can point to it."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from compression.errors import EdgepressError

KeyPath = tuple[str | int, ...]


def dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


@dataclass(frozen=True)
class Located:
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

    def moving(self, moved: Mapping[KeyPath, KeyPath]) -> "Located":
        return replace(self, moved=moved)

    def _origin(self, path: KeyPath) -> KeyPath:
        for length in range(len(path), 0, -1):
            if path[:length] in self.moved:
                return (*self.moved[path[:length]], *path[length:])
        within = (place for moved, place in self.moved.items() if moved[: len(path)] == path and path not in self.lines)
        return next(within, path)


def read_yaml(file: Path, text: str | None = None) -> Located:
    """Parse one YAML document: the file's, or `text` that stood in it. Raises EdgepressError for a missing file, wrong syntax or a key given twice."""
    try:
        text = file.read_text() if text is None else text
        root, value = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except FileNotFoundError:
        raise EdgepressError(f"there is no recipe {file}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise EdgepressError(f"{file} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise EdgepressError(f"{file}:{line}: not YAML: {getattr(error, 'problem', error)}") from None
    if root is None:
        raise EdgepressError(f"{file}: the recipe is empty")
    lines: dict[KeyPath, int] = {}
    _locate(root, (), lines, file)
    return Located(file, value, lines, text)


def _locate(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], file: Path) -> None:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, key.value)
            if here in lines:
                raise EdgepressError(f"{file}:{key.start_mark.line + 1}: the key {key.value!r} stands twice (first on line {lines[here]})")
            lines[here] = key.start_mark.line + 1
            _locate(value, here, lines, file)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            _locate(value, (*path, number), lines, file)


def nearest(word: str, known: Iterable[str]) -> str:
    """What was probably meant, as the end of a message; empty where nothing known is like it."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
