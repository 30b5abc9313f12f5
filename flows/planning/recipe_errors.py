"""Turn what pydantic finds wrong in a recipe into messages with file, line, key and remedy. Imports no torch."""

import re
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from compression.errors import EdgepressError, nearest
from compression.settings import Settings
from flows.planning.nodes import StageExecution
from flows.planning.source_map import KeyPath, SourceMap, yaml_type
from tasks.stage import Stage

_LIST = "this must be a list: [one, another]"
_MESSAGES = {"missing": "this key is missing", "tuple_type": _LIST, "list_type": _LIST}  # in place of pydantic's
_MAX_UNKNOWN_KEYS = 3  # of one mapping, before they share a message
_ALTERNATIVE = re.compile(r"[A-Z]\w*Source|bool|(literal|list)\[.*\]")  # in a path of pydantic: one of several types


def recipe_error(error: ValidationError, source: SourceMap, prefix: KeyPath, model: type[BaseModel]) -> EdgepressError:
    """Turn pydantic's findings into lines of `file:line: key: what is wrong`.

    Args:
        error: What pydantic raised.
        source: The recipe's file.
        prefix: Key path of the value that was validated.
        model: The model it was validated with.
    """
    messages: dict[KeyPath, list[str]] = {}
    unknown: dict[KeyPath, list[KeyPath]] = {}  # unknown keys by the mapping that has them
    for finding in error.errors(include_url=False):
        path = tuple(part for part in finding["loc"] if part != "[key]" and not _ALTERNATIVE.fullmatch(str(part)))
        message = _message(finding, path, model)
        if finding["type"] == "extra_forbidden" and path not in messages:
            unknown.setdefault(path[:-1], []).append(path)
        earlier = messages.setdefault(path, [])
        earlier.append(f"or {message[0].lower()}{message[1:]}" if path != finding["loc"] and earlier else message)
    for mapping, keys in unknown.items():
        if len(keys) > _MAX_UNKNOWN_KEYS:
            names = ", ".join(str(key[-1]) for key in keys[:_MAX_UNKNOWN_KEYS])
            for key in keys[1:]:
                del messages[key]
            more = len(keys) - _MAX_UNKNOWN_KEYS
            messages[keys[0]] = [f"there are no such keys: {names} and {more} more; keys: {', '.join(_keys_at(model, mapping))}"]
    containers = {path[:length] for path in messages for length in range(len(path))}  # a finding inside one is more to the point
    lines = (str(source.error((*prefix, *path), ", ".join(texts))) for path, texts in messages.items() if path not in containers)
    return EdgepressError("\n".join(lines))


def _message(finding: ErrorDetails, path: KeyPath, model: type[BaseModel]) -> str:
    kind, read_as = finding["type"], yaml_type(finding["input"])
    if kind == "extra_forbidden":
        return _unknown_key(str(path[-1]), path[:-1], model)
    if kind in _MESSAGES:
        return _MESSAGES[kind]
    if kind in ("dict_type", "model_type"):
        keys = _keys_at(model, path)
        return f"this must be a mapping of {', '.join(keys)}" if keys else "this must be a mapping: {key: value}"
    if kind == "invalid_key" or finding["loc"][-1] == "[key]":
        return f"the key {finding['input']} is a {read_as} in YAML, and a text is needed; put quotes round it: '{finding['input']}'"
    message = finding["msg"].removeprefix("Value error, ")
    if kind in ("string_type", "literal_error") and read_as and not (kind == "literal_error" and read_as == "number"):
        return f"{message}; in YAML this is a {read_as}, and quotes make it a text"
    return message


def _unknown_key(key: str, path: KeyPath, model: type[BaseModel]) -> str:
    parent = _model_at(model, path)
    if parent is not None and issubclass(parent, Settings) and key in parent.former_names:
        return f"this key is called {parent.former_names[key]} now"
    keys = _keys_at(model, path)
    return "there is no such key" + (f"{nearest(key, keys)}; keys: {', '.join(keys)}" if keys else "")


def _keys_at(model: type[BaseModel], path: KeyPath) -> list[str]:
    """The keys allowed at a path within a model; none where no model is there."""
    found = _model_at(model, path)
    if found is None:
        return []
    return [*found.model_fields, *(StageExecution.model_fields if issubclass(found, Stage) else ())]


def _model_at(model: type[BaseModel], path: KeyPath) -> type[BaseModel] | None:
    """The model that describes the value at a path within another model."""
    annotation: Any = model
    for key in path:
        if parent := _model_of(annotation):
            annotation = parent.model_fields[str(key)].annotation if key in parent.model_fields else None
        else:
            annotation = (get_args(annotation) or (None,))[-1]  # the values of a mapping
    return _model_of(annotation)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The model that an annotation, optional or not, names."""
    types = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((each for each in types if isinstance(each, type) and issubclass(each, BaseModel)), None)
