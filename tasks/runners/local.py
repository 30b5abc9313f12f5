"""Children on this machine: forks of a server that has torch loaded, within a budget, ended together. Imports no torch."""

import json
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import signal
import tempfile
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from compression.errors import EdgepressError
from compression.files import write_json
from tasks.errors import Cancelled, JobFailed
from tasks.runners.budget import Budget
from tasks.runners.executor import EventHandler, Job, JobResult
from tasks.runners.folder import EventReader, prepare_folder
from tasks.runners.machine import IsCancelled, acquire_devices, machine_lock
from tasks.runners.memory_pressure import MemoryWatch
from tasks.runners.worker import DISK_FULL, NO_SPACE, PRELOAD, forked

PATIENCE = 3.0
"""Seconds that a job waits for other runs on the machine before it says so."""


class LocalExecutor:
    """Runs jobs in children of this process, within a budget."""

    def __init__(self, budget: Budget):
        self._budget = budget
        self._starting = threading.Lock()
        self._running: set[BaseProcess] = set()
        self.closed = False

    def preload(self) -> None:
        """Start the fork server, which imports torch while the caller continues."""
        os.environ["PYTHONSAFEPATH"] = "1"  # a user's own tasks.py or flows/ in the current directory must not shadow ours
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")  # of killed children's semaphores
        multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOAD))
        _shorten_socket_paths()
        multiprocessing.resource_tracker.ensure_running()  # it unblocks SIGINT, so it comes first
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # which the server inherits: Ctrl-C is for the flow
        try:
            multiprocessing.forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def run(self, job: Job, folder: Path, on_event: EventHandler) -> JobResult:
        """See `Executor.run`."""
        prepare_folder(folder)
        return self.work(job, folder, on_event)

    def work(
        self, job: Job, folder: Path, on_event: EventHandler, is_cancelled: IsCancelled = lambda: False, directory: str | None = None
    ) -> JobResult:
        """Run a job in a prepared folder.

        Args:
            job: The job.
            folder: Its folder (tasks/runners/folder.py).
            on_event: Gets its events.
            is_cancelled: Called again and again; True ends the child.
            directory: The base of relative paths in the job; None: the directory of this process.

        Raises:
            Cancelled: `is_cancelled` returned True, or the executor was closed.
        """

        def stopped() -> bool:
            return self.closed or is_cancelled()

        with (
            acquire_devices(job.device, job.devices, stopped) as devices, self._budget.acquire(job, on_event, stopped),
            machine_lock(exclusive=job.exclusive, is_cancelled=_announce_waiting(stopped, job, on_event)),
        ):  # fmt: skip
            spec = {
                "call": job.call, "arguments": job.arguments, "threads": job.threads, "seed": job.seed, "device": job.device,
                "visible_devices": devices, "directory": directory or str(Path.cwd()),
            }  # fmt: skip
            write_json(folder / "job.json", spec)
            process = multiprocessing.get_context("forkserver").Process(target=forked, args=(str(folder / "job.json"),))
            with self._starting:
                if stopped():
                    raise Cancelled()
                try:
                    process.start()
                except (EOFError, OSError) as error:  # the next start brings up another one
                    raise JobFailed(f"the fork server ended while it started this stage ({error})", transient=True) from None
                self._running.add(process)
            memory = MemoryWatch(_pid(process))
            try:
                timed_out = _watch(process, EventReader(folder), memory, on_event, job.timeout, stopped)
            finally:
                _end_group(process)
                process.join()
                self._running.discard(process)
        if self.closed:
            raise Cancelled()
        return _outcome(folder, process.exitcode, job.timeout if timed_out else None, memory)

    def close(self) -> None:
        """Kill all children; nothing can be started afterwards."""
        with self._starting:
            self.closed = True
            for process in list(self._running):
                _end_group(process)
        self._budget.wake()


def _shorten_socket_paths() -> None:
    """Have multiprocessing keep its sockets in /tmp where TMPDIR is too deep for their paths (107 bytes), as Python 3.14 does itself."""
    usual = tempfile.gettempdir()
    if len(os.fsencode(usual)) + len("/pymp-12345678/listener-12345678") > 107:
        tempfile.tempdir = "/tmp"
    try:
        multiprocessing.util.get_temp_dir()  # created once for the life of the process
    finally:
        tempfile.tempdir = usual


def _announce_waiting(stopped: IsCancelled, job: Job, on_event: EventHandler) -> IsCancelled:
    """Return `stopped`, which also notes once that the job waits for other runs, after it has waited a while."""
    since = time.monotonic()
    announced = False

    def is_cancelled() -> bool:
        nonlocal announced
        if not announced and time.monotonic() - since > PATIENCE:
            announced = True
            reason = "it is timed alone" if job.exclusive else "one of them is timed alone"
            on_event({"note": f"waits for other runs of edgepress on this machine: {reason}"})
        return stopped()

    return is_cancelled


def _watch(
    process: BaseProcess, events: EventReader, memory: MemoryWatch, on_event: EventHandler, timeout: float | None, stopped: IsCancelled
) -> bool:
    """Forward events until the child ends; returns whether it ran past its timeout (the caller then kills it). Raises Cancelled."""
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        memory.look()
        process.join(0.05)
        ended = process.exitcode is not None
        events.forward(on_event)
        if ended:
            return False
        if stopped():
            raise Cancelled()
        if deadline is not None and time.monotonic() > deadline:
            return True


def _pid(process: BaseProcess) -> int:
    assert process.pid is not None  # it was started
    return process.pid


def _end_group(process: BaseProcess) -> None:
    process.kill()  # first, for it may be too young to lead a group; does nothing once it has ended
    try:
        os.killpg(_pid(process), signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return  # it has ended already, with all its children


def _outcome(folder: Path, exitcode: int | None, timeout: float | None, memory: MemoryWatch) -> JobResult:
    log = folder / "log.txt"
    if timeout is not None:
        raise JobFailed(f"ran past its timeout of {timeout:g} s and was stopped", transient=False, log=log)
    if (folder / "result.json").exists():
        return JobResult.read(json.loads((folder / "result.json").read_text()))
    if (folder / "error.json").exists():
        error = json.loads((folder / "error.json").read_text())
        if error["kind"] == "user":
            raise EdgepressError(error["message"], key=error["key"])
        raise JobFailed(
            f"{error['type']}: {error['message']}",
            transient=error["type"] in {"OutOfMemoryError", "MemoryError"},
            log=folder / "error.json",
        )
    if exitcode == DISK_FULL:
        raise JobFailed(NO_SPACE, transient=False, log=log)
    if exitcode is None or exitcode >= 0:
        raise JobFailed(f"the process of this stage ended without a result, with exit status {exitcode}", transient=True, log=log)
    why = memory.why() if -exitcode == signal.SIGKILL else f"killed by {signal.Signals(-exitcode).name}"
    raise JobFailed(f"the process of this stage was {why}", transient=True, log=log)
