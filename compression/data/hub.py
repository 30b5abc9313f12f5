"""Data sets of the Hugging Face hub, pinned to a commit. Imports no torch; `HF_HUB_OFFLINE` is honoured."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from compression.data.spec import Source, Split
from compression.errors import UnusableData

_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_hub_id(path: str) -> bool:
    """Whether `path` is `owner/name` (or a bare name) and nothing of that name lies on this machine."""
    named = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path) is not None
    return named and Path(path).suffix not in (".txt", ".jsonl", ".parquet") and not Path(path).exists()


def resolve_commit(path: str, revision: str | None) -> str:
    """The commit that `revision` (default: main) of a hub data set stands for: the hub is asked once in a process, so that a run reads one commit
    throughout. Offline, the one last seen on this machine.

    Raises UnusableData: no such data set or revision, or offline and never seen.
    """
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import constants

    name = revision or "main"
    if not constants.is_offline_mode():
        return _asked(path, name)
    seen = _seen(path, name)
    if not seen.is_file():
        raise UnusableData(
            f"there is no file or directory {path}; as a hub data set it cannot be reached: HF_HUB_OFFLINE is set", key="path"
        )
    return seen.read_text().strip()


@cache
def _asked(path: str, name: str) -> str:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        commit = huggingface_hub.HfApi().dataset_info(path, revision=name).sha
    except (OSError, errors.HTTPError) as error:  # not found, refused, or not reachable
        hint = "; HF_HUB_OFFLINE=1 takes what was last seen on this machine" if _seen(path, name).is_file() else ""
        raise UnusableData(
            f"there is no file or directory {path}, and the hub gives no data set of that name at {name}: {error}{hint}", key="path"
        ) from None
    if commit is None:
        raise UnusableData(f"the hub tells no commit for the data set {path} at {name}; give one with revision:", key="revision")
    return commit


def _seen(path: str, name: str) -> Path:
    """Where huggingface_hub keeps the commit that a revision stood for when it was last asked."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=path, repo_type="dataset") / "refs" / name


def records(source: Source, split: Split, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The records of a split. Raises UnusableData: no such data set, split or column, or only another revision is at hand."""
    import datasets

    if source.splits is not None and split not in source.splits:
        raise UnusableData(f"{source.path}: splits names no {split}; give one: splits: {{{split}: ...}}", key="splits")
    commit = resolve_commit(source.path, source.revision)
    try:
        builder = datasets.load_dataset_builder(source.path, source.config, revision=commit)
    except (OSError, ValueError) as error:  # not found, not reachable, unknown configuration
        raise UnusableData(f"the hub data set {source.path} at {commit} cannot be opened: {error}", key="path") from None
    # Out of reach of the hub, datasets silently takes whichever revision it has prepared before.
    if _COMMIT.fullmatch(str(builder.hash)) and builder.hash != commit:
        raise UnusableData(
            f"{source.path}: only revision {builder.hash} is on this machine, and {commit} cannot be reached", key="revision"
        )
    name = (source.splits or {}).get(split, split)
    if builder.info.splits and name not in builder.info.splits:
        raise UnusableData(f"{source.path} has no split {name!r}; it has: {', '.join(builder.info.splits)}", key="splits")
    builder.download_and_prepare()
    table = builder.as_dataset(split=name)
    missing = [c for c in columns if c not in table.column_names]
    if missing:
        raise UnusableData(f"{source.path}: there is no column {missing[0]!r}; there are: {', '.join(table.column_names)}", key="column")
    yield from table
