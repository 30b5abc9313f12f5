"""Jobs that travel to other processes, on this or another machine, through the shared folder of each. Imports no torch.

    asked.json  what a flow asks of a worker. The flow holds a lock on it while it wants the job; a worker that finds the lock free, because
                the flow was killed, stopped, or asked anew (then it is another file), ends what it does for it.

So a worker needs nothing but the folder in the same place, with file locks that hold between machines (NFS 4, or one machine).
"""

import json
import os
import socket
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import IO, Any

from compression.errors import EdgepressError, Incompatible
from compression.files import write_json
from compression.locks import acquire, open_lock, try_acquire
from tasks.errors import Cancelled, JobFailed
from tasks.runners.executor import EventHandler, Job, JobResult
from tasks.runners.folder import EventReader, cleared
from tasks.runners.local import LocalExecutor
from tasks.stage import stage_kinds
from tasks.store.identity import library_versions

ASKED = "asked.json"
STARTS = 3
"""How often a job whose worker was lost is started, before this counts as its own failure (and as one of the stage's `retries`)."""


class WorkerLost(JobFailed):
    """A worker that died in the middle of a job: nobody's failure, so the job is started again elsewhere."""

    def __init__(self, message: str):
        super().__init__(message, transient=True)


class RemoteExecutor(ABC):
    """Children on workers elsewhere. What is timed stays here, so that all tokens/s of a run are of one machine."""

    def __init__(self, local: LocalExecutor, paths: Sequence[Path]):
        self._local = local
        self._paths = paths
        self.closed = False

    def preload(self) -> None:
        """Reach the workers, and make ready for what is timed here."""
        self._local.preload()
        self.connect()

    def run(self, job: Job, folder: Path, on_event: EventHandler) -> JobResult:
        """See `Executor.run`."""
        if job.exclusive:
            return self._local.run(job, folder, on_event)
        cleared(folder)
        events = EventReader(folder)
        for start in range(1, STARTS + 1):
            with asked(folder, self._paths, job) as attempt:
                try:
                    answer = self.bring(job, folder, attempt, lambda: events.forward(on_event), lambda text: on_event({"note": text}))
                    if "stopped" not in answer:
                        break
                    if self.closed:
                        raise Cancelled()
                    raise WorkerLost(f"the worker on {answer['host']} was shut down")
                except WorkerLost:
                    if start == STARTS:
                        raise
        events.forward(on_event)
        for note in answer["notes"]:
            on_event({"note": f"{answer['host']}: {note}"})
        return _read(answer)

    def close(self) -> None:
        """Nobody wants anything any more: workers end their jobs within a second or two of it."""
        self.closed = True
        self._local.close()

    @abstractmethod
    def connect(self) -> None:
        """Raises EdgepressError where no worker is reached, or one does not fit."""

    @abstractmethod
    def bring(self, job: Job, folder: Path, attempt: str, forward: Callable[[], None], note: Callable[[str], None]) -> dict[str, Any]:
        """Have a worker `serve` the folder, calling `forward` now and then; returns its answer. `note` tells what a person should know.

        Raises WorkerLost, Cancelled once it is closed, JobFailed where no worker is left.
        """


@cache
def environment() -> dict[str, str]:
    """Versions of everything here that decides a stage's bytes or a measurement."""
    decide = {library for kind in stage_kinds().values() for library in kind.libraries}
    return library_versions(("edgepress", *sorted(decide)))


@contextmanager
def asked(folder: Path, paths: Sequence[Path], job: Job | None = None) -> Iterator[str]:
    """Want a job done while the block runs; yields the name of this attempt. Without a job, only whether workers fit is asked."""
    attempt = uuid.uuid4().hex
    document = {
        "attempt": attempt, "host": socket.gethostname(), "directory": str(Path.cwd()), "paths": [str(path) for path in paths],
        "environment": environment(), "job": asdict(job) if job else None,
    }  # fmt: skip
    write_json(folder / ASKED, document)
    with open_lock(folder / ASKED) as handle:
        acquire(handle)
        yield attempt


class Request:
    """What a flow asks, as a worker sees it."""

    def __init__(self, file: IO[str], document: dict[str, Any]):
        self._file = file
        self._looked = time.monotonic()
        self._wanted = True
        self.job = Job(**document["job"]) if document["job"] else None
        self.directory = str(document["directory"])

    def is_cancelled(self) -> bool:
        """Whether the flow wants it no more. Looks once a second."""
        if self._wanted and time.monotonic() - self._looked > 1:
            self._looked = time.monotonic()
            self._wanted = not _free(self._file)
        return not self._wanted


def _free(file: IO[str]) -> bool:
    try:
        return try_acquire(file.fileno(), shared=True)
    except OSError:  # on a network file system: another file took its place
        return True


@contextmanager
def request(folder: Path, attempt: str) -> Iterator[Request]:
    """What a flow asks of this machine. Raises Incompatible, naming the host, where this machine cannot do it; Cancelled where the flow is gone."""
    host, here = socket.gethostname(), folder / ASKED
    try:
        file = here.open("r+")
    except OSError as error:
        raise Incompatible(
            f"the worker on {host} cannot use {here} ({error.strerror}): workers need the store in the same place, writable",
            key="execution",
        ) from None
    with file:
        document = json.load(file)
        if document["attempt"] != attempt or _free(file):
            raise Cancelled()
        for path in (*document["paths"], document["directory"]):
            if not os.path.exists(path):  # noqa: PTH110  (as text, from another machine)
                raise Incompatible(f"the worker on {host} does not see {path}, which {document['host']} has there", key="execution")
        mine = environment()
        other = [
            f"{name} {mine[name]}, not {v}"
            for name, v in document["environment"].items()
            if mine[name] not in (v, "absent") and v != "absent"
        ]
        if other:
            raise Incompatible(f"the worker on {host} has {'; '.join(other)}: its bytes would not be those of this plan", key="execution")
        yield Request(file, document)


def problem(folder: str, attempt: str) -> str | None:
    """Why this machine cannot serve the flow that asks, if it cannot."""
    try:
        with request(Path(folder), attempt):
            return None
    except (Incompatible, Cancelled) as error:
        return str(error)


def serve(folder: Path, attempt: str, executor: LocalExecutor) -> dict[str, Any]:
    """Do what is asked in a folder, on this machine; returns the answer, whatever came of it, as JSON."""
    notes: list[str] = []

    def on_event(event: dict[str, Any]) -> None:  # the flow reads the child's events itself
        if "note" in event:
            notes.append(event["note"])

    answer: dict[str, Any]
    try:
        with request(folder, attempt) as wanted:
            assert wanted.job is not None
            answer = {"done": asdict(executor.work(wanted.job, folder, on_event, wanted.is_cancelled, wanted.directory))}
    except Cancelled:
        answer = {"stopped": True}
    except EdgepressError as error:
        answer = {"mistake": {"message": str(error), "key": error.key}}
    except JobFailed as error:
        answer = {"failed": {"message": str(error), "transient": error.transient, "log": str(error.log or "")}}
    except Exception as error:  # noqa: BLE001  (a full disk, whatever it was: the flow would wait for ever)
        answer = {"failed": {"message": f"{type(error).__name__}: {error}", "transient": False, "log": ""}}
    return {**answer, "host": socket.gethostname(), "notes": notes}


def answered(folder: Path, attempt: str) -> Path:
    """Where a worker that can tell nobody directly leaves its answer."""
    return folder / f"answer-{attempt}.json"


def heartbeat_lock(folder: Path, attempt: str) -> Path:
    """Held by the process that serves an attempt, where nothing else tells that it lives."""
    return folder / f"host-{attempt}.lock"


def device_asked(folder: Path) -> str:
    """The device of the job that is asked for in a folder."""
    return str(json.loads((folder / ASKED).read_text())["job"]["device"])


def _read(answer: dict[str, Any]) -> JobResult:
    """What a worker answered. Raises as `Executor.run` does."""
    if "done" in answer:
        return JobResult.read(answer["done"])
    if "mistake" in answer:
        raise EdgepressError(answer["mistake"]["message"], key=answer["mistake"]["key"])
    failed = answer["failed"]
    raise JobFailed(
        f"on {answer['host']}: {failed['message']}", transient=failed["transient"], log=Path(failed["log"]) if failed["log"] else None
    )
