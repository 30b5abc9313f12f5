"""MLflow's sqlite file: whole or not there, whoever makes it and however it dies."""

import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks.mlflow_database import make_database
from tests.drill.place import megabytes

REPOSITORY = Path(__file__).parents[2]
MAKE = "import sys\nfrom tasks.mlflow_database import make_database\nmake_database(sys.argv[1])\n"
COUNT = "from mlflow import MlflowClient; print(len(MlflowClient(sys.argv[1]).search_experiments()))\n"


def start(uri: str, code: str = MAKE) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, uri], cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_killed_in_the_middle_it_is_made_anew(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    first = start(uri)
    while megabytes(tmp_path) < 0.1:  # some of its tables are there
        assert first.poll() is None, first.communicate()
        time.sleep(0.001)
    first.kill()
    first.communicate()
    assert not (tmp_path / "mlflow.db").exists()
    both = [start(uri, MAKE + COUNT) for _ in range(2)]  # at once
    assert [process.communicate(timeout=120)[0].strip() for process in both] == ["1", "1"]
    assert {file.name for file in tmp_path.iterdir()} == {"mlflow.db", ".mlflow.db.lock"}
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:1", "postgresql://nowhere/mlflow", "sqlite://", "sqlite:///:memory:", "sqlite:///{there}"]
)
def test_other_addresses_and_what_is_there_are_left_alone(uri: str, tmp_path: Path) -> None:
    there = tmp_path / "there.db"
    there.write_text("as it is")
    make_database(uri.format(there=there))
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("there.db", "as it is")]
