"""Tasks of lm-evaluation-harness by name or file: found, checked and fingerprinted before anything runs. Imports no torch.

A name is looked up in the YAML files of the installed harness. A file is your own task in the harness's format; its data may be on this machine:

    task: towns
    dataset_path: json
    dataset_kwargs: {data_files: {test: towns.jsonl}}   # from where the command is given, as the harness reads it
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compression.data import hub
from compression.errors import EdgepressError, Incompatible, UnusableData, nearest
from compression.evaluation.findings import Transform
from compression.files import digest_file

NEW_TOKENS = 256  # of a task that sets no limit, as in the harness
_TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of the same limit; the first one counts

_READERS = ("json", "csv", "parquet", "text", "arrow")  # of the package datasets, for files
_TASK = re.compile(rb"^task:[ \t]*[\"']?([\w.-]+)", re.MULTILINE)
_GROUP = re.compile(rb"^group:", re.MULTILINE)


@dataclass(frozen=True)
class Task:
    """A task, with the file that defines it; groups and tags of the harness have none here, and it looks them up itself."""

    name: str
    file: Path | None


def find_tasks(names: tuple[str, ...]) -> list[Task]:
    """Return the tasks of a recipe.

    Args:
        names: Names of tasks, or YAML files.

    Raises:
        UnusableData: A task does not exist (with the nearest name), or a file is not a task.
    """
    return [_own(Path(name)) if name.endswith((".yaml", ".yml")) else _installed(name) for name in names]


def check_tasks(names: tuple[str, ...], max_length: int) -> None:
    """Find every task, also those of groups, and its data, as far as its file names them.

    Args:
        names: Names of tasks, or YAML files.
        max_length: Positions of the model.

    Raises:
        UnusableData: Something is missing or out of reach.
        Incompatible: A task samples its answers, or writes more than the model has room for.
    """
    tasks = find_tasks(names)
    for number, task in enumerate(tasks):
        if task.name in (before.name for before in tasks[:number]):
            raise UnusableData(f"two tasks are called {task.name}, and their metrics would be too; rename one", key="harness")
        for name, config in single_tasks(task).items():
            if config.get("output_type") == "generate_until":
                settings = config.get("generation_kwargs") or {}
                refuse_sampling(name, settings)
                if new_tokens(settings) >= max_length:
                    raise Incompatible(
                        f"the task {name} writes up to {new_tokens(settings)} tokens, which leaves no room for a prompt in the model's "
                        f"{max_length}; a task file of your own may include it and set generation_kwargs", key="harness",
                    )  # fmt: skip
            _data(name, config)


def refuse_sampling(task: str, settings: Mapping[str, Any]) -> None:
    """Raise Incompatible for generation settings with which the harness draws tokens at random."""
    drawn = settings.get("do_sample")
    if (drawn or drawn is None) and float(settings.get("temperature", 1.0 if drawn else 0.0)) > 0:
        raise Incompatible(f"the task {task} samples its answers (do_sample, temperature); generation is greedy here", key="harness")


def new_tokens(settings: Mapping[str, Any]) -> int:
    """Return how many tokens a task lets a model write."""
    return int(next((settings[name] for name in _TOKEN_LIMITS if settings.get(name) is not None), NEW_TOKENS))


def fingerprint_task(name: str) -> list[Any]:
    """Return what decides the items of a task or group besides the harness's version: your own task file with its code, the data of every single task."""
    (task,) = find_tasks((name,))
    data = [_data(single, config) for single, config in sorted(single_tasks(task).items())]
    return [task.name, _definition(task), list({json.dumps(each): each for each in data}.values())]


def metric_name(task: str, metric: str, chosen: str = "none") -> str:
    """Return the metric's name, such as harness.gsm8k.exact_match.strict-match_stderr (gsm8k, `exact_match_stderr`, the filter `strict-match`)."""
    end = "_stderr" if metric.endswith("_stderr") else ""
    return f"harness.{task}.{metric.removesuffix(end)}{'' if chosen == 'none' else f'.{chosen}'}{end}"


def task_metrics(name: str) -> dict[str, Transform | None]:
    """Return the metrics of a task, or of a group with everything below it, with the transform of those that may have items.

    A task that filters answers, or judges them with code, has metrics that only it knows: `harness.{task}.*`. So has a group.
    """
    (task,) = find_tasks((name,))
    found: dict[str, Transform | None] = {}
    for single, config in single_tasks(task).items():
        listed = config.get("metric_list")
        names = [each.get("metric") for each in listed] if isinstance(listed, list) else []
        if not names or any(config.get(key) for key in ("process_results", "filter_list", "class")) or not all(map(_plain, names)):
            found[f"harness.{single}.*"] = None
            continue
        for metric in names:
            found |= {metric_name(single, metric): "mean", metric_name(single, f"{metric}_stderr"): None}
        found[metric_name(single, "count")] = None
    return found | {f"harness.{group}.*": None for group in _groups(task)}


def _plain(metric: Any) -> bool:
    """Return whether a metric is a name, and not code."""
    return isinstance(metric, str) and metric.isidentifier()


def _own(file: Path) -> Task:
    if not file.is_file():
        raise UnusableData(f"there is no task file {file}", key="harness")
    config = _config(file)
    name = config.get("task")
    if not isinstance(name, str):
        raise UnusableData(f"{file}: a task file needs `task:`, the name of one task", key="harness")
    return Task(name, file.resolve())


def _installed(name: str) -> Task:
    return Task(name, _task_files()[name]) if name in _task_files() else _look_up(name)


@cache
def _task_files() -> dict[str, Path]:
    """Return the files of single tasks by the name that they contain: this takes a moment, the harness's own index many seconds."""
    files: dict[str, Path] = {}
    for file in sorted((_home() / "tasks").rglob("*.yaml")):
        content = file.read_bytes()
        if (found := _TASK.search(content)) and not _GROUP.search(content):
            files.setdefault(found[1].decode(), file)
    return files


def _look_up(name: str) -> Task:
    """Find a group, a tag, or a task whose file does not contain its name, in the harness's own index."""
    if name not in _index():
        raise UnusableData(
            f"lm-evaluation-harness has no task {name!r}{nearest(name, _index(), most=3) or '.'} A task of your own is a file: path/to/{name}.yaml",
            key="harness",
        )
    return Task(name, None)


@cache
def _index() -> Mapping[str, Any]:
    """Return every task, group and tag of the harness by name, which takes it many seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager().task_index


def single_tasks(task: Task) -> dict[str, dict[str, Any]]:
    """Return the configurations of all tasks that a task, group or tag stands for, by name; functions are given as paths."""
    if task.file is not None:
        return {task.name: _config(task.file)}
    return {name: config for name, config in _below(task.name) if config is not None}


def _groups(task: Task) -> list[str]:
    return [] if task.file is not None else [name for name, config in _below(task.name) if config is None]


def _below(entry: str | dict[str, Any]) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Yield an entry of a group's list, and everything below it: single tasks with their configuration, groups without.

    An entry is a name, or a mapping that adds to the task of that name, or defines a task that is not in the index.
    """
    more = {} if isinstance(entry, str) else entry
    name = entry if isinstance(entry, str) else more.get("group") or more["task"]
    known = _index().get(name)
    if known and known.cfg is None:  # a tag
        below = sorted(known.tags)
    elif "group" in (own := known.cfg if known else more):
        yield name, None
        below = own["task"] if isinstance(own.get("task"), list) else []
    else:
        yield name, {**own, **more}
        return
    for each in below:
        yield from _below(each)


def _home() -> Path:
    spec = find_spec("lm_eval")
    assert spec is not None and spec.origin is not None  # the extra is checked before
    return Path(spec.origin).parent


def _config(file: Path) -> dict[str, Any]:
    """Read a task file with what it includes; functions are given as paths. Raises UnusableData for a file that is not a YAML mapping."""
    import yaml
    from lm_eval.tasks._yaml_loader import load_yaml  # no public function reads a task file without building the task

    try:
        return load_yaml(file, resolve_func=False)
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise UnusableData(f"{file} is no task file: {error}", key="harness") from None


def _definition(task: Task) -> Any:
    """Return the content of your own file with what it includes, and the code next to it; the harness's version stands for its own files."""
    if task.file is None or task.file.is_relative_to(_home()):
        return "installed"
    folder = str(task.file.parent)
    text = json.dumps(_config(task.file), sort_keys=True, default=str).replace(folder, ".")
    code = {file.name: digest_file(file) for file in sorted(task.file.parent.glob("*.py"))}
    return [hashlib.sha256(text.encode()).hexdigest(), code]


def _data(name: str, config: Mapping[str, Any]) -> Any:
    """Return digests of a task's files, or the commit of its data set on the hub; None for tasks made by code, which name neither.

    Raises:
        UnusableData: Files are missing, or a data set is out of reach.
    """
    path, arguments = config.get("dataset_path"), config.get("dataset_kwargs") or {}
    if not isinstance(path, str):
        return None
    if path in _READERS:
        return [[file.name, digest_file(file)] for file in _files(name, arguments)]
    if Path(path).exists():
        return [[str(f.relative_to(path)), digest_file(f)] for f in sorted(Path(path).rglob("*")) if f.is_file()]
    try:
        return [path, config.get("dataset_name"), hub.resolve_commit(path, arguments.get("revision"))]
    except EdgepressError as error:
        raise UnusableData(f"the data of the task {name} cannot be reached: {error}", key="harness") from None


def _files(task: str, arguments: dict[str, Any]) -> Iterator[Path]:
    named = arguments.get("data_files")
    groups = named.values() if isinstance(named, dict) else [named]
    for pattern in (p for group in groups for p in (group if isinstance(group, list) else [group])):
        if not isinstance(pattern, str):
            raise UnusableData(f"the task {task}: dataset_kwargs needs data_files, the files of the task", key="harness")
        if "://" in pattern:
            raise UnusableData(
                f"the task {task}: {pattern} is not on this machine; download it first: its content is part of the result's key",
                key="harness",
            )
        folder = Path(arguments.get("data_dir") or "")
        found = sorted(Path().glob(str(folder / pattern))) if not Path(pattern).is_absolute() else [Path(pattern)]
        if not found or not all(file.is_file() for file in found):
            raise UnusableData(f"the task {task}: there is no file {(folder / pattern).resolve()}, which it names", key="harness")
        yield from found
