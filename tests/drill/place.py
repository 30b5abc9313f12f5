"""A directory in which a recipe runs on its own, and what is to hold there after a drill."""

import json
import os
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from mlflow import MlflowClient

from compression.checkpoints.checkpoint import file_digests
from tasks.store.garbage import verify
from tasks.store.journal import current_state, read_runs
from tasks.store.store import Store

ELSEWHERE = ("EDGEPRESS_STORE", "MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME", "PYTHONSAFEPATH")


class Place:
    """A directory in which the recipe runs, with a store, outputs, tracking and temporary files of its own."""

    def __init__(self, folder: Path, recipe: str, overrides: Sequence[str]):
        self.folder, self.work, self.objects = folder, folder / ".edgepress" / "work", folder / ".edgepress" / "objects"
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
        self.arguments = ["run", recipe, *(word for override in overrides for word in ("--set", override))]
        self.environment = {key: value for key, value in os.environ.items() if key not in ELSEWHERE} | {
            "HF_HUB_OFFLINE": "1", "TMPDIR": str(folder / "tmp"), "PREFECT_HOME": str(folder / "prefect-home"),
        }  # fmt: skip

    def start(self, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-m", "flows.cli.main", *arguments]
        with (self.folder / "command.log").open("ab") as log:
            return subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=log, stderr=log, start_new_session=True)

    def store(self) -> Store:
        return Store(self.folder / ".edgepress")

    def summary(self) -> dict[str, Any]:
        (file,) = (self.folder / "outputs").glob("*/run.json")
        return json.loads(file.read_text())

    def contents(self) -> dict[str, dict[str, str]]:
        """sha256 of every file of every stage, by identity."""
        return {entry.name: file_digests(entry / "content") for entry in self.objects.iterdir()}

    def processes(self) -> list[psutil.Process]:
        """Processes that work in this directory."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()).is_relative_to(self.folder):
                    found.append(process)
        return found

    def log(self) -> str:
        return (self.folder / "command.log").read_text(errors="replace")[-2000:]


def inspect(calm: Place, hurt: Place) -> Iterator[tuple[str, str, list[str]]]:
    """What is to hold in the end: its name, what was found, and what is wrong with it."""
    expected, found = calm.contents(), hurt.contents()
    other = [identity for identity in expected.keys() | found.keys() if expected.get(identity) != found.get(identity)]
    yield "artifacts byte-identical to the undisturbed run", f"{len(found)} stages, {sum(map(len, found.values()))} files", other
    links = {name: _links(place) for name, place in (("undisturbed", calm), ("killed", hurt))}
    yield (
        "every result linked by its name",
        f"{len(links['killed'])} links",
        [str(links)] if len({frozenset(v.items()) for v in links.values()}) > 1 else [],
    )
    store = hurt.store()
    checked = verify(store)
    yield "store verifies clean", f"{checked.entries} entries, {checked.records} records", [str(path) for path in checked.damaged]
    left = psutil.wait_procs(hurt.processes(), timeout=120)[1]  # the fork server ends when it sees that the command did
    yield "no process or server left", f"{len(left)} left", [" ".join(words_of(process)) for process in left]
    runs = [(run.run, current_state(store, run)) for run in read_runs(store)]
    yield "no run open in the journal", _counted(state for _, state in runs), [name for name, state in runs if state == "Running"]
    for what, states in (("MLflow", _mlflow_states(hurt)), ("Prefect", _prefect_states(hurt))):
        open_ones = [state for state in states if state not in {"FINISHED", "FAILED", "KILLED", "COMPLETED", "CRASHED", "CANCELLED"}]
        yield f"no run open in {what}", _counted(states), open_ones
    scratch = [*hurt.work.iterdir(), *(store.root / "damaged").iterdir()]
    yield "no scratch left in the store", f"{len(scratch)} files", [str(path) for path in scratch]
    temporary = megabytes(hurt.folder / "tmp")  # locks of the machine, and of each killed command the socket of its fork server
    yield "next to nothing left in TMPDIR", f"{temporary:.3f} MB", [f"{temporary:.1f} MB"] if temporary > 1 else []


def _links(place: Place) -> dict[str, str]:
    return {link.name: link.resolve().parent.name for link in (place.folder / "outputs").glob("*/*") if link.is_symlink()}


def _counted(states: Iterable[str]) -> str:
    return ", ".join(f"{count} {state.lower()}" for state, count in Counter(states).most_common())


def _mlflow_states(place: Place) -> list[str]:
    client = MlflowClient(f"sqlite:///{place.folder / 'mlflow.db'}")
    found, token = [], None
    while True:
        page = client.search_runs([e.experiment_id for e in client.search_experiments()], max_results=1000, page_token=token)
        found += [run.info.status for run in page]
        if not (token := page.token):
            return found


def _prefect_states(place: Place) -> list[str]:
    with sqlite3.connect(place.folder / ".edgepress" / "prefect" / "prefect.db") as connection:
        return [state for table in ("flow_run", "task_run") for (state,) in connection.execute(f"select state_type from {table}")]


def megabytes(folder: Path) -> float:
    """Of all files below, some of which may go meanwhile, with their folders: `rglob` would raise then."""
    total = 0
    for below, _, files in os.walk(folder):
        for name in files:
            with suppress(FileNotFoundError):
                total += Path(below, name).stat().st_size
    return total / 1e6


def words_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
