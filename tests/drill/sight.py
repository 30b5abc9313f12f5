"""Moments to strike at, and how they are recognised by what a command writes into its store."""

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from tasks.store.journal import read_runs
from tests.drill.place import Place, words_of

Where = Literal["starting", "training", "calibration", "committing", "between", "measuring"]
Whom = Literal["command", "child"]
DONE = ("Completed", "Cached")
COMMIT_STEPS = 6  # of a millisecond, that a command may go on in a commit at most before it is struck
GAP_SECONDS, START_SECONDS = 1.0, 5.0  # how long after it began a kill in a gap between stages, and in a start, comes at most


@dataclass
class Moment:
    """When to strike and whom: `share` of the way through what `where` names, in `stage`."""

    where: Where
    whom: Whom
    stage: str
    share: float

    def __str__(self) -> str:
        return f"{self.whom} in {self.where} at {self.share:.2f}{'' if self.where == 'starting' else f' of {self.stage}'}"


class Sight:
    """What one command does now, seen in its store. `rows` are those of the undisturbed run's summary, by stage."""

    def __init__(self, place: Place, rows: dict[str, dict[str, Any]], command: subprocess.Popen[bytes]):
        self.place, self.rows, self.command = place, rows, command
        self.started = time.time()
        self.since: dict[tuple[str, str], float] = {}  # when a commit, a gap, a measurement was first seen

    def jobs(self, stage: str, where: Where) -> list[Path]:
        """The events of the jobs that this command has begun and not ended, for a stage or for its measurements."""
        identity = self.rows[stage]["identity"]
        homes = self._measurements(identity) if where == "measuring" else [self.place.work / identity]
        return [events for home in homes if self._at_work(events := home / "events.jsonl")]

    def _measurements(self, identity: str) -> list[Path]:
        """The folders in which a stage's result is measured."""
        found = []
        for job in self.place.work.glob("measure-*/job.json"):
            with suppress(OSError, ValueError):  # it ended this instant
                if f"/{identity}/" in json.loads(job.read_text())["arguments"]["target"]:
                    found.append(job.parent)
        return found

    def _at_work(self, events: Path) -> bool:
        try:
            return events.stat().st_mtime >= self.started and not (events.parent / "result.json").exists()
        except FileNotFoundError:
            return False

    def has_come(self, moment: Moment) -> bool:
        match moment.where:
            case "training" | "calibration":
                return any(_progress(events) >= 0.95 * moment.share for events in self.jobs(moment.stage, moment.where))
            case "committing":
                return self._step_into_commit(moment)
            case "measuring":
                seconds = 0.9 * moment.share * self.rows[moment.stage]["measure_seconds"]
                return self._lasts("measure", moment.stage, bool(self.jobs(moment.stage, "measuring")), seconds)
            case "between":
                return self._lasts("gap", "", self._idle(), GAP_SECONDS * moment.share) and self._made(moment.stage)
            case "starting":
                return self._lasts("start", "", self._idle(), START_SECONDS * moment.share)

    def _lasts(self, what: str, stage: str, true: bool, seconds: float) -> bool:
        """Whether something has been true for some time. The time starts anew when it ends."""
        if not true:
            self.since.pop((what, stage), None)
            return False
        return time.monotonic() - self.since.setdefault((what, stage), time.monotonic()) >= seconds

    def _step_into_commit(self, moment: Moment) -> bool:
        """Once the job has brought its result, let the command go on by the millisecond until it commits, and leave it stopped there.

        A commit takes some milliseconds; a busy machine lets nobody watch as closely.
        """
        home = self.place.work / self.rows[moment.stage]["identity"]
        result = home / "result.json"
        try:
            if result.stat().st_mtime < self.started:
                return False
        except FileNotFoundError:
            return False
        command = psutil.Process(self.command.pid)
        steps = 0
        while self.command.poll() is None and home.exists():
            command.suspend()
            steps += any(home.glob("commit-*"))
            if steps > COMMIT_STEPS * moment.share:
                return True
            command.resume()
            time.sleep(0.001)
        return False

    def let_go(self) -> None:
        """Let the command go on, where it was stopped and lives."""
        if self.command.poll() is None:
            os.kill(self.command.pid, signal.SIGCONT)

    def _made(self, stage: str) -> bool:
        return (self.place.objects / self.rows[stage]["identity"]).exists()

    def _idle(self) -> bool:
        """Whether the run is under way, and no job is."""
        journals = (self.place.folder / ".edgepress" / "runs").glob("[!.]*.json")
        begun = any(file.stat().st_mtime >= self.started for file in journals)
        return begun and not any(self.jobs(stage, where) for stage in self.rows for where in ("training", "measuring"))

    def victim(self, moment: Moment) -> psutil.Process | None:
        """The process to strike: the command, the child that does this job, or where none works one of the servers that the command started.

        None where it is not there (any more).
        """
        if moment.whom == "command":
            return psutil.Process(self.command.pid)
        if moment.where in ("starting", "committing", "between"):
            name = "flows.run.prefect_server" if moment.share < 0.5 else "forkserver"
            family = psutil.Process(self.command.pid).children(recursive=True)
            return next((child for child in family if any(name in word for word in words_of(child))), None)
        workers = [_worker(events) for events in self.jobs(moment.stage, moment.where)]
        return next((worker for worker in workers if worker and Path(worker.cwd()).is_relative_to(self.place.folder)), None)

    def is_there(self, moment: Moment) -> bool:
        """Whether the command is in the moment now: what a long look at other processes may have missed."""
        match moment.where:
            case "training" | "calibration" | "measuring":
                return bool(self.jobs(moment.stage, moment.where))
            case "committing":
                return (self.place.work / self.rows[moment.stage]["identity"]).exists()
            case "starting" | "between":
                return self._idle()

    def is_past(self, moment: Moment) -> bool:
        """Whether the moment cannot come any more."""
        match moment.where:
            case "training" | "calibration" | "committing":
                return self._made(moment.stage) and not (self.place.work / self.rows[moment.stage]["identity"]).exists()
            case "measuring":
                latest = read_runs(self.place.store())[-1:]
                return any(stage.name == moment.stage and stage.state in DONE for run in latest for stage in run.stages)
            case "starting" | "between":
                return False


def _progress(events: Path) -> float:
    """How far a job says it is, of 1."""
    with events.open("rb") as stream:
        stream.seek(max(0, events.stat().st_size - 8192))
        lines = stream.read().rpartition(b"\n")[0].splitlines()
    for line in reversed(lines):
        with suppress(ValueError):  # the first one may be half a line
            if "progress" in (event := json.loads(line)):
                return float(event["progress"][0] / event["progress"][1])
    return 0.0


def _worker(events: Path) -> psutil.Process | None:
    """The process that works on a job, as its events say."""
    with suppress(OSError, ValueError, psutil.NoSuchProcess):
        started = [line for line in events.read_bytes().splitlines() if line.startswith(b'{"started"')]
        return psutil.Process(int(json.loads(started[-1])["started"].rpartition("/")[2])) if started else None
    return None
