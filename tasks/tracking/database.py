"""MLflow's sqlite file, created completely or not at all. Imports no torch.

MLflow creates it in many steps that are not a transaction: killed in the middle, or raced by another process, it leaves a file that never opens again.
"""

import sqlite3
from contextlib import closing, suppress
from pathlib import Path

from compression.locks import file_lock


def make_database(uri: str) -> None:
    """Create the sqlite file that an address of MLflow names, where it does not exist; other addresses belong to servers."""
    file = _file_of(uri)
    if file is None or file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(file.with_name(f".{file.name}.lock")):
        if file.exists():  # another process created it meanwhile
            return
        draft = file.with_name(f".{file.name}.new")
        for leftover in ("", "-journal", "-wal", "-shm"):
            draft.with_name(draft.name + leftover).unlink(missing_ok=True)
        _fill(draft)
        draft.replace(file)


def _file_of(uri: str) -> Path | None:
    if not uri.startswith("sqlite:"):
        return None
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    with suppress(ArgumentError):  # MLflow reports it
        name = make_url(uri).database
        return Path(name) if name and name != ":memory:" and not name.startswith("file:") else None
    return None


def _fill(file: Path) -> None:
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with closing(sqlite3.connect(file)) as connection:  # stays so: a commit brings one file to disk then, not two; Prefect's is so too
        connection.execute("PRAGMA journal_mode=WAL")
    store = SqlAlchemyStore(f"sqlite:///{file}", DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)  # as MLflow itself would for this address
    store.engine.dispose()
