"""Data sets of the Hugging Face hub, pinned to a commit. Imports no torch; `HF_HUB_OFFLINE` is honoured."""

import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from compression.data.spec import Source, Split
from compression.errors import UnusableData

_COMMIT = re.compile(r"[0-9a-f]{40}")


def hub_failure(error: Exception) -> str:
    """Return why the hub gave nothing, from the exception of huggingface_hub: it is switched off, unreachable, or refuses."""
    from huggingface_hub import constants, errors

    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
    reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    if isinstance(cause, errors.HFValidationError):
        return f"it is no name that the hub has: {reason}"
    if constants.is_offline_mode():
        switch = (
            "TRANSFORMERS_OFFLINE" if os.environ.get("TRANSFORMERS_OFFLINE") and not os.environ.get("HF_HUB_OFFLINE") else "HF_HUB_OFFLINE"
        )
        return f"the hub is switched off ({switch} is set): {reason}"
    return f"the hub {'refuses it' if isinstance(cause, errors.HfHubHTTPError) else f'at {constants.ENDPOINT} cannot be reached'}: {reason}"


def is_hub_id(path: str) -> bool:
    """Return whether `path` is `owner/name` (or a bare name) and no file of that name is on this machine."""
    named = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path) is not None
    return named and Path(path).suffix not in (".txt", ".jsonl", ".parquet") and not Path(path).exists()


def resolve_commit(path: str, revision: str | None) -> str:
    """Return the commit of `revision` (default: main) of a hub data set.

    A process queries the hub once, so that a run reads one commit throughout. Offline it is the commit last seen on this machine.

    Raises:
        UnusableData: No such data set or revision, or offline and never seen.
    """
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(path)
    except HFValidationError as error:
        raise UnusableData(f"there is no file or directory {path}, and {hub_failure(error)}", key="path") from None
    name = revision or "main"
    if not constants.is_offline_mode():
        return _query_commit(path, name)
    seen = _seen(path, name)
    if not seen.is_file():
        reason = hub_failure(FileNotFoundError("it was never seen on this machine"))
        raise UnusableData(f"there is no file or directory {path}, and {reason}", key="path")
    return seen.read_text().strip()


@cache
def _query_commit(path: str, name: str) -> str:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        commit = huggingface_hub.HfApi().dataset_info(path, revision=name).sha
    except (OSError, errors.HTTPError) as error:
        hint = "; HF_HUB_OFFLINE=1 takes what was last seen on this machine" if _seen(path, name).is_file() else ""
        raise UnusableData(
            f"there is no file or directory {path}, and as a data set at {name}, {hub_failure(error)}{hint}", key="path"
        ) from None
    if commit is None:
        raise UnusableData(f"the hub names no commit for the data set {path} at {name}; give one with revision:", key="revision")
    return commit


def _seen(path: str, name: str) -> Path:
    """Return the file in which huggingface_hub keeps the last known commit of a revision."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=path, repo_type="dataset") / "refs" / name


def records(source: Source, split: Split, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yield the records of a split. Raises UnusableData: no such data set, split or column, or only another revision is on this machine."""
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
