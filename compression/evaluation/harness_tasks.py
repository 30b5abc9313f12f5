"""Tasks of lm-evaluation-harness by name or file: found, checked and fingerprinted before anything runs. Imports no torch.

A name is looked up in the YAML files of the installed harness. A file is a task of one's own in the harness's format; its data may lie on this machine:

    task: towns
    dataset_path: json
    dataset_kwargs: {data_files: {test: towns.jsonl}}   # from where the command is given, as the harness reads it
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compression.checkpoint import digest_file
from compression.data import hub
from compression.errors import EdgepressError, UnusableData

_READERS = ("json", "csv", "parquet", "text", "arrow")  # of the package datasets, for files
_TASK = re.compile(rb"^task:[ \t]*[\"']?([\w.-]+)", re.MULTILINE)
_GROUP = re.compile(rb"^group:", re.MULTILINE)


@dataclass(frozen=True)
class Task:
    """A task, with the file that defines it; groups and tags of the harness have none here, and it looks them up itself."""

    name: str
    file: Path | None


def find_tasks(asked: tuple[str, ...]) -> list[Task]:
    """Every task that a recipe asks for.

    Raises UnusableData with the nearest name for one that does not exist, and for a file that is no task.
    """
    return [_own(Path(name)) if name.endswith((".yaml", ".yml")) else _installed(name) for name in asked]


def check_tasks(asked: tuple[str, ...]) -> None:
    """Find every task, and its data as far as its file tells where it is. Raises UnusableData for what is missing or out of reach."""
    for task in find_tasks(asked):
        _data(task)


def fingerprint_tasks(asked: tuple[str, ...]) -> list[Any]:
    """What decides the items of tasks besides the harness's version: own task files with their code and data, the commits of data sets on the hub."""
    return [[task.name, _definition(task), _data(task)] for task in find_tasks(asked)]


def task_names(asked: tuple[str, ...]) -> list[str]:
    return [task.name for task in find_tasks(asked)]


def _own(file: Path) -> Task:
    if not file.is_file():
        raise UnusableData(f"there is no task file {file}", key="harness")
    config = _config(file)
    name = config.get("task")
    if not isinstance(name, str):
        raise UnusableData(f"{file}: a task file needs `task:`, the name of one task", key="harness")
    return Task(name, file.resolve())


def _installed(name: str) -> Task:
    return Task(name, _glance()[name]) if name in _glance() else _looked_up(name)


@cache
def _glance() -> dict[str, Path]:
    """Files of single tasks by the name that stands in them: read in a moment, where the harness's own index takes many seconds."""
    files: dict[str, Path] = {}
    for file in sorted((_home() / "tasks").rglob("*.yaml")):
        content = file.read_bytes()
        if (found := _TASK.search(content)) and not _GROUP.search(content):
            files.setdefault(found[1].decode(), file)
    return files


@cache
def _looked_up(name: str) -> Task:
    """A group, a tag, or a task whose name its file does not say at a glance, by the harness's own index."""
    from lm_eval.tasks import TaskManager

    index = TaskManager().task_index
    if name not in index:
        close = difflib.get_close_matches(name, index, n=3, cutoff=0.6)
        hint = f"; did you mean {' or '.join(close)}?" if close else "."
        raise UnusableData(
            f"lm-evaluation-harness has no task {name!r}{hint} A task of your own is a file: path/to/{name}.yaml", key="harness"
        )
    return Task(name, None)


def _home() -> Path:
    spec = find_spec("lm_eval")
    assert spec is not None and spec.origin is not None  # the extra is checked before
    return Path(spec.origin).parent


def _config(file: Path) -> dict[str, Any]:
    """A task file with what it includes; functions are told as paths. Raises UnusableData for a file that is no YAML mapping."""
    import yaml
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        return load_yaml(file, resolve_func=False)
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise UnusableData(f"{file} is no task file: {error}", key="harness") from None


def _definition(task: Task) -> Any:
    """Of an own file: its content with what it includes, and the code beside it that it may name. The harness's version stands for its own."""
    if task.file is None or task.file.is_relative_to(_home()):
        return "installed"
    folder = str(task.file.parent)
    text = json.dumps(_config(task.file), sort_keys=True, default=str).replace(folder, ".")
    code = {file.name: digest_file(file) for file in sorted(task.file.parent.glob("*.py"))}
    return [hashlib.sha256(text.encode()).hexdigest(), code]


def _data(task: Task) -> Any:
    """Digests of a task's files, or the commit of its data set on the hub; None for groups, tags and tasks made by code, which do not tell.

    Raises UnusableData for files that are missing, and for a data set out of reach.
    """
    if task.file is None:
        return None
    config = _config(task.file)
    path, arguments = config.get("dataset_path"), config.get("dataset_kwargs") or {}
    if not isinstance(path, str):
        return None
    if path in _READERS:
        return [[file.name, digest_file(file)] for file in _files(task, arguments)]
    if Path(path).exists():
        return [[str(f.relative_to(path)), digest_file(f)] for f in sorted(Path(path).rglob("*")) if f.is_file()]
    try:
        return [path, config.get("dataset_name"), hub.resolve_commit(path, arguments.get("revision"))]
    except EdgepressError as error:
        raise UnusableData(f"the data of the task {task.name} cannot be reached: {error}", key="harness") from None


def _files(task: Task, arguments: dict[str, Any]) -> Iterator[Path]:
    named = arguments.get("data_files")
    groups = named.values() if isinstance(named, dict) else [named]
    for pattern in (p for group in groups for p in (group if isinstance(group, list) else [group])):
        if not isinstance(pattern, str):
            raise UnusableData(f"{task.file}: dataset_kwargs needs data_files, the files of the task", key="harness")
        if "://" in pattern:
            raise UnusableData(
                f"{task.file}: {pattern} is not on this machine; download it first, so that its content can be told", key="harness"
            )
        folder = Path(arguments.get("data_dir") or "")
        found = sorted(Path().glob(str(folder / pattern))) if not Path(pattern).is_absolute() else [Path(pattern)]
        if not found or not all(file.is_file() for file in found):
            raise UnusableData(f"{task.file}: there is no file {(folder / pattern).resolve()}, which the task names", key="harness")
        yield from found
