"""MLflow's sqlite file, made whole or not at all. Imports no torch.

MLflow makes it in many steps that are no transaction: killed in the middle, or raced by another process, it never opens again.
"""

import sqlite3
from contextlib import closing, suppress
from pathlib import Path

from compression.locks import file_lock


def make_database(uri: str) -> None:
    """Make the sqlite file that an address of MLflow names, where it is not there yet; other addresses are left to their servers."""
    file = _file_of(uri)
    if file is None or file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(file.with_name(f".{file.name}.lock")):
        if file.exists():  # another process made it meanwhile
            return
        beside = file.with_name(f".{file.name}.new")
        for leftover in ("", "-journal", "-wal", "-shm"):
            beside.with_name(beside.name + leftover).unlink(missing_ok=True)
        _fill(beside)
        beside.replace(file)


def _file_of(uri: str) -> Path | None:
    if not uri.startswith("sqlite:"):
        return None
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    with suppress(ArgumentError):  # MLflow says what is wrong with it
        name = make_url(uri).database
        return Path(name) if name and name != ":memory:" and not name.startswith("file:") else None
    return None


def _fill(file: Path) -> None:
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with closing(sqlite3.connect(file)) as connection:  # stays so: a commit brings one file to disk then, not two; Prefect's is so too
        connection.execute("PRAGMA journal_mode=WAL")
    made = SqlAlchemyStore(f"sqlite:///{file}", DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)  # as MLflow itself would for this address
    made.engine.dispose()
