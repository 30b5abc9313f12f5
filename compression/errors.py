"""The errors people see. Each says what is wrong, where, and what would be right."""

import copyreg
import difflib
from collections.abc import Iterable
from typing import Any

from compression.redaction import redacted


def first_of(names: Iterable[str], most: int = 4) -> str:
    """Return the first of many names, sorted, and how many more there are: "a, b and 3 more"."""
    ordered = sorted(names)
    return ", ".join(ordered[:most]) + (f" and {len(ordered) - most} more" if len(ordered) > most else "")


def nearest(name: str, known: Iterable[str], most: int = 1) -> str:
    """Suggest the known names most like an unknown one, as the end of a message: "; did you mean 'keep'?". Empty where none is like it."""
    close = difflib.get_close_matches(name, list(known), n=most, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


class PicklableError(Exception):
    """An error that can be pickled with any signature of `__init__`: unpickling does not call it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]  # the stubs leave it out


class EdgepressError(PicklableError):
    """Base of every error that the user can fix: printed as one message, without a traceback.

    `key` names the parameter at fault (`group_size`, `model`), where one is, so that a recipe error can point to its line.
    The message carries no secrets: user and password of every address in it are masked.
    """

    def __init__(self, message: str, *, key: str | None = None):
        super().__init__(redacted(message))
        self.key = key


class UnusableModel(EdgepressError):
    """A model directory that cannot be opened, or a model that edgepress does not take."""


class UnusableData(EdgepressError):
    """A data file that is missing, empty or of another shape than needed."""


class Incompatible(EdgepressError):
    """A method, format or runtime that does not take this checkpoint."""


class MissingExtra(EdgepressError):
    """An optional package that is not installed."""

    def __init__(self, package: str, extra: str, needed_for: str):
        super().__init__(f"{needed_for} needs the package {package}; install it with: pip install 'edgepress[{extra}]'")
