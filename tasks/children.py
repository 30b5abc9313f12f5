"""Starting, watching and ending the children that work. Imports no torch; the fork server does, once."""

import fcntl
import json
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from compression.errors import EdgepressError
from tasks.files import write_json
from tasks.worker import PRELOAD, forked

EventSink = Callable[[dict[str, Any]], None]


class JobFailed(Exception):
    """A child that did not bring a result. `transient` says whether trying again can help."""

    def __init__(self, message: str, *, transient: bool, log: Path | None = None):
        super().__init__(message)
        self.transient = transient
        self.log = log


class Stopped(JobFailed):
    """A child that `Children.close` ended, or did not let start: nobody's failure."""

    def __init__(self) -> None:
        super().__init__("stopped", transient=False)


@dataclass(frozen=True)
class Job:
    """One call of `module:function(**arguments, threads=, context=)` in a child."""

    call: str
    arguments: dict[str, Any]
    threads: int
    seed: int = 0
    device: str = "cpu"
    timeout: float | None = None
    alone: bool = False  # timing: nothing else of edgepress may run on this machine meanwhile


@dataclass(frozen=True)
class Done:
    """What a child brought: the metrics its function returned, and the seconds it worked (waiting and start-up left out)."""

    metrics: dict[str, float]
    seconds: float


class Children:
    """All children of one flow: started from a fork server, limited by a budget of cores, ended together."""

    def __init__(self, cores: int):
        self._cores = cores
        self._free = cores
        self._changed = threading.Condition()
        self._running: set[BaseProcess] = set()
        self._closed = False

    @staticmethod
    def preload() -> None:
        """Start the fork server, which imports torch while the caller goes on. Call from the main thread, before any other."""
        os.environ["PYTHONSAFEPATH"] = "1"  # a user's own tasks.py or flows/ in the current directory must not shadow ours
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")  # of killed children's semaphores
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOAD))
        multiprocessing.forkserver.ensure_running()

    def run(self, job: Job, folder: Path, sink: EventSink) -> Done:
        """Run a job to its end and return what it brought; events reach `sink` as they come.

        Raises EdgepressError (a cause the user can mend), JobFailed (a crash, a kill, a timeout).
        """
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("result.json", "error.json", "events.jsonl"):
            (folder / name).unlink(missing_ok=True)
        spec = {"call": job.call, "arguments": job.arguments, "threads": job.threads, "seed": job.seed, "device": job.device}
        write_json(folder / "job.json", spec)
        cores = self._cores if job.alone else min(job.threads, self._cores)
        with self._cores_taken(cores), machine_lock(alone=job.alone, given_up=lambda: self._closed):
            process = multiprocessing.get_context("forkserver").Process(target=forked, args=(str(folder / "job.json"),))
            with self._changed:
                if self._closed:
                    raise Stopped()
                process.start()
                self._running.add(process)
            try:
                timed_out = _watch(process, folder / "events.jsonl", sink, job.timeout)
            finally:
                _end_group(process)
                process.join()
                self._running.discard(process)
        if self._closed:
            raise Stopped()
        return _outcome(folder, process.exitcode, job.timeout if timed_out else None)

    def close(self) -> None:
        """Kill whatever runs; nothing can be started afterwards."""
        with self._changed:
            self._closed = True
            for process in list(self._running):
                _end_group(process)
            self._changed.notify_all()

    @contextmanager
    def _cores_taken(self, count: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._free >= count or self._closed)
            self._free -= count
        try:
            yield
        finally:
            with self._changed:
                self._free += count
                self._changed.notify_all()


@contextmanager
def machine_lock(*, alone: bool, given_up: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Hold this machine, shared with other work or alone, among all edgepress processes of all users. Dies with its owner.

    Who wants it alone waits at the door, so that nobody else comes in meanwhile: work that goes on sharing it would never let go.
    given_up  asked while others hold it; raises Stopped when it says so
    """
    with _lock_file("edgepress-machine.lock") as machine:
        with _lock_file("edgepress-machine-door.lock") as door:
            _wait(door, fcntl.LOCK_EX, given_up)
            _wait(machine, fcntl.LOCK_EX if alone else fcntl.LOCK_SH, given_up)
        yield


@contextmanager
def _lock_file(name: str) -> Iterator[int]:
    """An open lock file of the machine. Closing it lets its lock go."""
    path = Path(tempfile.gettempdir()) / name
    try:
        handle = os.open(path, os.O_RDONLY)  # another user's file can be locked, but neither written nor opened with O_CREAT
    except FileNotFoundError:
        handle = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
    try:
        yield handle
    finally:
        os.close(handle)


def _wait(handle: int, how: int, given_up: Callable[[], bool]) -> None:
    while not _locked(handle, how):
        if given_up():
            raise Stopped()
        time.sleep(0.05)


def _locked(handle: int, how: int) -> bool:
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _watch(process: Any, events: Path, sink: EventSink, timeout: float | None) -> bool:
    """Forward events until the child ends; returns whether it ran past the timeout (and was killed)."""
    deadline = None if timeout is None else time.monotonic() + timeout
    position = 0
    while True:
        process.join(0.05)
        ended = process.exitcode is not None
        position = _forward(events, position, sink)
        if ended:
            return False
        if deadline is not None and time.monotonic() > deadline:
            return True


def _forward(events: Path, position: int, sink: EventSink) -> int:
    """Pass on the whole lines after `position`; returns where to go on."""
    if not events.exists():
        return position
    with events.open("rb") as stream:
        stream.seek(position)
        whole, newline, _ = stream.read().rpartition(b"\n")
    for line in whole.splitlines():
        sink(json.loads(line))
    return position + len(whole) + len(newline)


def _end_group(process: BaseProcess) -> None:
    assert process.pid is not None
    process.kill()  # first, for it may be too young to lead a group; does nothing once it has ended
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return  # it has ended already, with all its children


def _outcome(folder: Path, exitcode: int | None, timeout: float | None) -> Done:
    log = folder / "log.txt"
    if timeout is not None:
        raise JobFailed(f"ran past its timeout of {timeout:g} s and was stopped", transient=True, log=log)
    if (folder / "result.json").exists():
        return Done(**json.loads((folder / "result.json").read_text()))
    if (folder / "error.json").exists():
        error = json.loads((folder / "error.json").read_text())
        if error["kind"] == "user":
            raise EdgepressError(error["message"], key=error["key"])
        raise JobFailed(
            f"{error['type']}: {error['message']}",
            transient=error["type"] in {"OutOfMemoryError", "MemoryError"},
            log=folder / "error.json",
        )
    if exitcode is None or exitcode >= 0:
        raise JobFailed(f"the process of this stage ended without a result, with exit status {exitcode}", transient=True, log=log)
    name = signal.Signals(-exitcode).name
    hint = " (most often the kernel, because memory ran out)" if name == "SIGKILL" else ""
    raise JobFailed(f"the process of this stage was killed by {name}{hint}", transient=True, log=log)
