"""Errors of ours cross processes whole: pickled, they come out as what they were."""

import ast
import builtins
import importlib
import inspect
import pickle
import threading
from pathlib import Path

import pytest

from compression.errors import EdgepressError, MissingExtra
from compression.training.distributed import _portable

ROOT = Path(__file__).parents[2]
SAMPLES = {"transient": True, "path": ("stages", 0)}  # of parameters that are not text


def exception_classes() -> list[type[Exception]]:
    """The exception classes of the four packages, found in the source: only modules that define one are imported."""
    defined: list[tuple[str, str, set[str]]] = []  # module, class, names of its bases
    for package in ("compression", "export", "tasks", "flows"):
        for file in sorted((ROOT / package).rglob("*.py")):
            module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            classes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ClassDef)]
            defined += [(module, node.name, {base.id for base in node.bases if isinstance(base, ast.Name)}) for node in classes]
    known = {name for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, BaseException)}
    while new := {name for _, name, bases in defined if bases & known} - known:
        known |= new
    return [getattr(importlib.import_module(module), name) for module, name, bases in defined if bases & known]


def made(kind: type[Exception]) -> Exception:
    """An error with something for every parameter."""
    parameters = [*inspect.signature(kind.__init__).parameters.values()][1:]
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return kind("a message")
    values = {parameter.name: SAMPLES.get(parameter.name, f"a {parameter.name}") for parameter in parameters}
    return kind(**values)


@pytest.mark.parametrize("kind", exception_classes(), ids=lambda kind: kind.__name__)
def test_every_error_survives_pickling(kind: type[Exception]) -> None:
    error = made(kind)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.args, vars(copy)) == (kind, str(error), error.args, vars(error))


def test_the_search_finds_errors_with_arguments() -> None:
    assert {EdgepressError, MissingExtra} < set(exception_classes())


class Unpicklable(Exception):
    def __init__(self, message: str):
        super().__init__(message)
        self.lock = threading.Lock()  # which no pickler takes, whatever a library registers for exceptions


def test_a_strange_error_keeps_its_words() -> None:
    """An exception of a library that the parent of a distributed training could not unpickle."""
    sent = pickle.loads(pickle.dumps(_portable(Unpicklable("broken in a library"))))
    assert (type(sent), str(sent)) == (RuntimeError, "Unpicklable: broken in a library")
