"""Jobs that travel to other processes, on this or another machine, through the shared folder of each. Imports no torch.

    request.json  what a flow requests of a worker. The flow holds a lock on it while it needs the job. A worker that finds the lock free, because
                  the flow was killed, stopped, or requested the job again (then it is another file), ends the job.

So a worker needs nothing but the folder in the same place, with file locks that work between machines (NFS 4, or one machine).
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
from tasks.runners.folder import EventReader, prepare_folder
from tasks.runners.local import LocalExecutor
from tasks.stage import stage_kinds
from tasks.store.identity import library_versions

REQUEST = "request.json"
STARTS = 3
"""How often a job whose worker was lost starts before the loss counts as the job's failure (and as one of the stage's `retries`)."""


class WorkerLost(JobFailed):
    """A worker died in the middle of a job. That is not the job's failure, so it starts again elsewhere."""

    def __init__(self, message: str):
        super().__init__(message, transient=True)


class RemoteExecutor(ABC):
    """Runs jobs on workers elsewhere. Timings stay on this machine, so that all tokens/s of a run come from the same one."""

    def __init__(self, local: LocalExecutor, paths: Sequence[Path]):
        self._local = local
        self._paths = paths
        self.closed = False

    def preload(self) -> None:
        """Connect to the workers, and prepare this machine for timings."""
        self._local.preload()
        self.connect()

    def run(self, job: Job, folder: Path, on_event: EventHandler) -> JobResult:
        """See `Executor.run`."""
        if job.exclusive:
            return self._local.run(job, folder, on_event)
        prepare_folder(folder)
        events = EventReader(folder)
        for start in range(1, STARTS + 1):
            with request_job(folder, self._paths, job) as attempt:
                try:
                    answer = self.run_remotely(
                        job, folder, attempt, lambda: events.forward(on_event), lambda text: on_event({"note": text})
                    )
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
        """Withdraw all requests: workers end their jobs within a second or two."""
        self.closed = True
        self._local.close()

    @abstractmethod
    def connect(self) -> None:
        """Connect to the workers. Raises EdgepressError where none answers, or one does not fit."""

    @abstractmethod
    def run_remotely(
        self, job: Job, folder: Path, attempt: str, forward: Callable[[], None], note: Callable[[str], None]
    ) -> dict[str, Any]:
        """Have a worker `serve` the folder; return its answer.

        Args:
            job: The job.
            folder: The job's folder.
            attempt: The name of this attempt.
            forward: Passes on the job's events; call it every moment.
            note: Gets what a person should know.

        Raises:
            WorkerLost: The worker died.
            Cancelled: The executor was closed.
            JobFailed: No worker remains.
        """


@cache
def environment() -> dict[str, str]:
    """Return the versions of everything on this machine that decides a stage's bytes or a measurement."""
    decide = {library for kind in stage_kinds().values() for library in kind.libraries}
    return library_versions(("edgepress", *sorted(decide)))


@contextmanager
def request_job(folder: Path, paths: Sequence[Path], job: Job | None = None) -> Iterator[str]:
    """Request a job of a worker while the block runs; yield the name of this attempt.

    Args:
        folder: The job's folder.
        paths: What the worker must see in the same place.
        job: The job; None: only check whether workers fit (`find_problem`).
    """
    attempt = uuid.uuid4().hex
    document = {
        "attempt": attempt, "host": socket.gethostname(), "directory": str(Path.cwd()), "paths": [str(path) for path in paths],
        "environment": environment(), "job": asdict(job) if job else None,
    }  # fmt: skip
    write_json(folder / REQUEST, document)
    with open_lock(folder / REQUEST) as handle:
        acquire(handle)
        yield attempt


class Request:
    """A flow's request, as a worker sees it."""

    def __init__(self, file: IO[str], document: dict[str, Any]):
        self._file = file
        self._checked = time.monotonic()
        self._open = True
        self.job = Job(**document["job"]) if document["job"] else None
        self.directory = str(document["directory"])

    def is_cancelled(self) -> bool:
        """Return whether the flow has withdrawn its request. Checks once a second."""
        if self._open and time.monotonic() - self._checked > 1:
            self._checked = time.monotonic()
            self._open = not _free(self._file)
        return not self._open


def _free(file: IO[str]) -> bool:
    try:
        return try_acquire(file.fileno(), shared=True)
    except OSError:  # on a network file system: another file took its place
        return True


@contextmanager
def accept_request(folder: Path, attempt: str) -> Iterator[Request]:
    """Read a flow's request of this machine.

    Raises:
        Incompatible: This machine cannot serve it; the message names the host.
        Cancelled: The flow is gone.
    """
    host, here = socket.gethostname(), folder / REQUEST
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


def find_problem(folder: str, attempt: str) -> str | None:
    """Return why this machine cannot serve a request; None where it can."""
    try:
        with accept_request(Path(folder), attempt):
            return None
    except (Incompatible, Cancelled) as error:
        return str(error)


def serve(folder: Path, attempt: str, executor: LocalExecutor) -> dict[str, Any]:
    """Run the job that a folder requests on this machine; return the answer as JSON, also where the job fails."""
    notes: list[str] = []

    def on_event(event: dict[str, Any]) -> None:  # the flow reads the child's events itself
        if "note" in event:
            notes.append(event["note"])

    answer: dict[str, Any]
    try:
        with accept_request(folder, attempt) as request:
            assert request.job is not None
            answer = {"done": asdict(executor.work(request.job, folder, on_event, request.is_cancelled, request.directory))}
    except Cancelled:
        answer = {"stopped": True}
    except EdgepressError as error:
        answer = {"mistake": {"message": str(error), "key": error.key}}
    except JobFailed as error:
        answer = {"failed": {"message": str(error), "transient": error.transient, "log": str(error.log or "")}}
    except Exception as error:  # noqa: BLE001  (whatever failed, as a full disk: without an answer the flow would wait for ever)
        answer = {"failed": {"message": f"{type(error).__name__}: {error}", "transient": False, "log": ""}}
    return {**answer, "host": socket.gethostname(), "notes": notes}


def response_file(folder: Path, attempt: str) -> Path:
    """Return the file for the answer of a worker that has no connection to the flow."""
    return folder / f"answer-{attempt}.json"


def heartbeat_lock(folder: Path, attempt: str) -> Path:
    """Return the file that the process serving an attempt locks, where nothing else shows that it lives."""
    return folder / f"host-{attempt}.lock"


def requested_device(folder: Path) -> str:
    """Return the device of the job that a folder requests."""
    return str(json.loads((folder / REQUEST).read_text())["job"]["device"])


def _read(answer: dict[str, Any]) -> JobResult:
    """The result in a worker's answer. Raises as `Executor.run` does."""
    if "done" in answer:
        return JobResult.read(answer["done"])
    if "mistake" in answer:
        raise EdgepressError(answer["mistake"]["message"], key=answer["mistake"]["key"])
    failed = answer["failed"]
    raise JobFailed(
        f"on {answer['host']}: {failed['message']}", transient=failed["transient"], log=Path(failed["log"]) if failed["log"] else None
    )
