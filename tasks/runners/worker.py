"""The child that does the work of one job: `python -P -m tasks.runners.worker job.json`.

The same entry serves the fork server, torchrun, containers and a person at a shell. A job file holds the call; tasks/runners/folder.py lists the
other files of its folder.
"""

import contextlib
import errno
import importlib
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from compression.context import Context
from compression.errors import EdgepressError
from compression.evaluation.findings import Findings
from compression.files import write_json
from compression.locks import file_lock
from compression.redaction import redacted
from tasks.runners.sampler import sampling

STAGE = "tasks.runners.jobs:compute_stage"
PRELOAD = (
    "torch",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "compression.checkpoints.loading",
    "tasks.runners.jobs",
    "tasks.runners.preload",
)
NO_SPACE = "no space left on the disk"
DISK_FULL = errno.ENOSPC
"""Exit status of a child whose disk is too full to write down how it ended."""
_PR_SET_PDEATHSIG = 1


def main(job_file: str) -> int:
    """Run the job; return the exit status. Every failure leaves error.json with the reason, except a kill and DISK_FULL."""
    try:
        return _main(job_file)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return DISK_FULL


def _main(job_file: str) -> int:
    folder = Path(job_file).parent
    job = json.loads(Path(job_file).read_text())
    with file_lock(folder / "job.lock"), _printing_into(folder / "log.txt"), (folder / "events.jsonl").open("a", buffering=1) as events:
        for name in ("result.json", "error.json"):
            (folder / name).unlink(missing_ok=True)  # of a child before, whose worker was lost
        events.write(("\n" if events.tell() else "") + json.dumps({"started": f"{socket.gethostname()}/{os.getpid()}"}) + "\n")
        started = time.monotonic()
        try:
            reporter = Events(events)
            watched = sampling(reporter.write) if job["call"] == STAGE else contextlib.nullcontext()  # not during a measurement of speed
            with watched:
                findings = _perform(job, reporter)
        except EdgepressError as error:
            write_json(folder / "error.json", {"kind": "user", "type": type(error).__name__, "message": str(error), "key": error.key})
            return 2
        except BaseException as error:  # noqa: BLE001  (the parent reads what it was)
            reason = NO_SPACE if isinstance(error, OSError) and error.errno == errno.ENOSPC else redacted(str(error))
            details = {"kind": "crash", "type": type(error).__name__, "message": reason, "traceback": redacted(traceback.format_exc())}
            write_json(folder / "error.json", details)
            return 1
        write_json(folder / "result.json", {**findings.document(), "seconds": time.monotonic() - started})
    return 0


def forked(job_file: str) -> None:
    """Entry of a child of the fork server: a process group of its own, which ends with the flow."""
    os.setpgid(0, 0)
    threading.Thread(target=_end_with_flow, daemon=True).start()
    sys.exit(main(job_file))


def _end_with_flow() -> None:
    """Kill the group when the flow dies. The fork server's death would come too late: it lives as long as any child holds its pipe."""
    flow = multiprocessing.parent_process()
    assert flow is not None
    flow.join()
    os.killpg(0, signal.SIGKILL)


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent, the process `parent`, dies (Linux; elsewhere it is ended on exit only)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the request
            os._exit(1)


class Events:
    """Progress, curve points and warnings of a job, as lines of JSON. Progress is thinned to ten lines a second."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.last = 0.0

    def context(self, seed: int, device: str) -> Context:
        """Return a context that reports here."""
        return Context(seed=seed, device=device, progress=self.progress, metrics=self.metrics, warn=self.warn)

    def progress(self, done: int, total: int, what: str) -> None:
        if done == total or time.monotonic() - self.last > 0.1:
            self.last = time.monotonic()
            self.write({"progress": [done, total, what]})

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.write({"metrics": dict(values), "step": step})

    def warn(self, message: str) -> None:
        self.write({"warning": message})

    def write(self, event: dict[str, Any]) -> None:
        self.stream.write(json.dumps(event) + "\n")


def _perform(job: dict[str, Any], events: Events) -> Findings:
    """Call the job's function, which returns Findings or metrics alone."""
    import torch

    os.chdir(job["directory"])
    if job["visible_devices"]:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(job["visible_devices"])  # torch has looked at no GPU yet
    torch.set_num_threads(job["threads"])
    if job["device"] != "cpu":  # CPU kernels repeat their bytes already when the number of threads is fixed
        torch.use_deterministic_algorithms(True, warn_only=True)
    logging.captureWarnings(True)
    module, _, name = job["call"].partition(":")
    function = getattr(importlib.import_module(module), name)
    returned = function(**job["arguments"], threads=job["threads"], context=events.context(job["seed"], job["device"]))
    return returned if isinstance(returned, Findings) else Findings(returned)


@contextlib.contextmanager
def _printing_into(path: Path) -> Iterator[None]:
    """Send what Python and native code print to a file: a run prints only what a person reads."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with path.open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            for number, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, number)
                os.close(copy)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
