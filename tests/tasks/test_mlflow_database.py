"""MLflow's sqlite file: complete or absent, also where its creator is killed or raced."""

import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.tracking.database import make_database
from tests.waiting import PATIENCE

REPOSITORY = Path(__file__).parents[2]
MAKE = "import sys\nfrom tasks.tracking.database import make_database\nmake_database(sys.argv[1])\n"
STRUCK = """
import os, signal
from sqlalchemy import Engine, event
made = []

@event.listens_for(Engine, "before_cursor_execute")
def strike(connection, cursor, statement, *_):
    made.extend(["table"] if "CREATE TABLE" in statement else [])
    if len(made) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
"""
COUNT = "from mlflow import MlflowClient; print(len(MlflowClient(sys.argv[1]).search_experiments()))\n"


def start(uri: str, code: str = MAKE) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, uri], cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_killed_creation_starts_anew(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    first = start(uri, STRUCK + MAKE)
    first.communicate()
    assert first.returncode == -signal.SIGKILL and (tmp_path / ".mlflow.db.new").exists()
    assert not (tmp_path / "mlflow.db").exists()
    both = [start(uri, MAKE + COUNT) for _ in range(2)]  # at once
    assert [process.communicate(timeout=PATIENCE)[0].strip() for process in both] == ["1", "1"]
    assert {file.name for file in tmp_path.iterdir()} == {"mlflow.db", ".mlflow.db.lock"}
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:1", "postgresql://nowhere/mlflow", "sqlite://", "sqlite:///:memory:", "sqlite:///{there}"]
)
def test_existing_file_and_servers_are_untouched(uri: str, tmp_path: Path) -> None:
    there = tmp_path / "there.db"
    there.write_text("as it is")
    make_database(uri.format(there=there))
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("there.db", "as it is")]
