"""A directory in which the command line runs in a process of its own, and what its runs leave."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from mlflow import MlflowClient
from mlflow.entities import Run

from compression.checkpoints.checkpoint import file_digests
from tests.flows.recipes import recipe
from tests.waiting import PATIENCE, until

SAFE = [sys.executable, "-P", "-m", "flows.cli.main"]
SCRIPT = [str(Path(sys.executable).with_name("edgepress"))]
DECOY = "raise SystemExit('a file of the user was imported')\n"


class Workshop:
    """A directory with a recipe, in which the command is run."""

    def __init__(self, folder: Path, checkpoint: Path):
        self.folder = folder
        folder.mkdir()
        (folder / "micro.yaml").write_text(recipe(checkpoint))
        hidden = ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "EDGEPRESS_STORE", "PYTHONSAFEPATH")
        self.environment = {
            **{key: value for key, value in os.environ.items() if key not in hidden},
            "HF_HUB_OFFLINE": "1", "PREFECT_HOME": str(folder / "prefect-home"), "TMPDIR": str(folder),
        }  # fmt: skip

    def start(self, *overrides: str, command: list[str] = SAFE) -> subprocess.Popen[str]:
        arguments = [*command, "run", "micro.yaml", *(word for override in overrides for word in ("--set", override))]
        return subprocess.Popen(
            arguments, cwd=self.folder, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )  # fmt: skip

    def run(self, *overrides: str, command: list[str] = SAFE) -> "Finished":
        """Run the command to its end."""
        process = self.start(*overrides, command=command)
        out, err = process.communicate(timeout=PATIENCE)
        summary = self.folder / "outputs" / "micro" / "run.json"
        return Finished(process.returncode, out, err, json.loads(summary.read_text()) if summary.exists() else {})

    def interrupt(self, moment: Callable[[], bool], how: signal.Signals) -> "Interrupted":
        """Start the command, send it a signal when the moment has come, and wait for its end."""
        process = self.start()
        try:
            until(moment, process=process)
            family = psutil.Process(process.pid).children(recursive=True)
        except BaseException:
            process.kill()
            raise
        process.send_signal(how)
        out, err = process.communicate(timeout=PATIENCE)
        return Interrupted(process.returncode, out, err, family)

    def computing(self, uses: str) -> Callable[[], bool]:
        """Whether a child works on a stage of this kind now."""

        def moment() -> bool:
            for job in (self.folder / ".edgepress" / "work").glob("*/job.json"):
                with suppress(FileNotFoundError):  # it ended this instant
                    if json.loads(job.read_text())["arguments"].get("stage", {}).get("uses") == uses:
                        return True
            return False

        return moment

    def has_trained(self) -> bool:
        with suppress(FileNotFoundError):  # a stage that ended this instant took its folder along
            return any((self.folder / ".edgepress" / "work").glob("*/work/checkpoint-*"))
        return False

    def contents(self) -> dict[str, dict[str, str]]:
        """Digests of all files in the store's objects, by identity."""
        return {entry.name: file_digests(entry / "content") for entry in (self.folder / ".edgepress" / "objects").iterdir()}

    def runs(self) -> list[Run]:
        """All MLflow runs, the oldest first."""
        client = MlflowClient(f"sqlite:///{self.folder / 'mlflow.db'}")
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        return list(client.search_runs(experiments, order_by=["attributes.start_time ASC"]))

    def latest(self) -> tuple[Run, dict[str, Run]]:
        """The parent run of the last pipeline, and its stages' runs by name."""
        runs = self.runs()
        parent = [run for run in runs if run.data.tags["edgepress.kind"] == "pipeline"][-1]
        below = {run.info.run_name: run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
        return parent, below

    def prefect_states(self, table: str) -> list[tuple[str, str, str]]:
        """(name, type of state, name of state) of all flow runs or task runs, the oldest first."""
        with sqlite3.connect(self.folder / ".edgepress" / "prefect" / "prefect.db") as connection:
            return connection.execute(f"select name, state_type, state_name from {table} order by created").fetchall()

    def processes(self) -> list[psutil.Process]:
        """Processes that still work in this directory."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and self.folder in [Path(process.cwd()), *Path(process.cwd()).parents]:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found


class Finished:
    def __init__(self, code: int, out: str, err: str, summary: dict[str, Any]):
        self.code, self.out, self.err, self.summary = code, out, err, summary

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["stage"]: row for row in self.summary["rows"]}

    def states(self) -> dict[str, str]:
        return {name: row["state"] for name, row in self.rows.items()}


class Interrupted:
    def __init__(self, code: int, out: str, err: str, family: list[psutil.Process]):
        self.code, self.out, self.err, self.family = code, out, err, family
