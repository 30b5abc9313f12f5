"""What the children of tests/tasks/test_children.py are asked to do."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from compression.context import Context
from compression.data import DataSpec
from compression.errors import Incompatible
from tasks.runners import worker
from tasks.runners.jobs import compute_stage
from tasks.stage import Inputs, Workplace, stage_kinds


def succeed(*, folder: str, threads: int, context: Context) -> dict[str, float]:
    import torch

    context.progress(1, 2, "half")
    context.metrics({"loss": 0.5}, 3)
    context.warn("narrow")
    print("a line that belongs into the log")
    return {
        "threads": float(torch.get_num_threads()),
        "asked": float(threads),
        "seed": float(context.seed),
        "leader": float(os.getpid() == os.getpgid(0)),
    }


def mistake(*, threads: int, context: Context) -> dict[str, float]:
    raise Incompatible("7 does not divide 64", key="group_size")


def crash(*, threads: int, context: Context) -> dict[str, float]:
    raise ZeroDivisionError("one over nothing")


def out_of_memory(*, threads: int, context: Context) -> dict[str, float]:
    raise MemoryError("more than there is")


def killed(*, threads: int, context: Context) -> dict[str, float]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def leave(*, threads: int, context: Context) -> dict[str, float]:
    os._exit(7)


def fill_disk(*, threads: int, context: Context) -> dict[str, float]:
    Path("/dev/full").write_text("x")
    return {}


def fail_on_full_disk(*, threads: int, context: Context) -> dict[str, float]:
    """Fail of something, on a disk that takes no file more."""

    def full(path: Path, _: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    worker.write_json = full
    raise ZeroDivisionError("one over nothing")


def run_filling_stage(*, into: str, **arguments: Any) -> dict[str, float]:
    """`compute_stage` of a stage that keeps a checkpoint, then fills the disk."""

    def run(_: Any, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        (place.work / "checkpoint").write_text("kept")
        with ({"out": place.out, "work": place.work}[into] / "half").open("wb", buffering=0) as half:
            while True:
                half.write(bytes(4096))

    setattr(stage_kinds()[arguments["stage"]["uses"]], "run", run)  # noqa: B010  (of this process alone)
    return compute_stage(**arguments)


def linger(*, folder: str, threads: int, context: Context) -> dict[str, float]:
    """Start a process of its own, write both ids down, and do not end."""
    below = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    beside = Path(folder, "pids.part")
    beside.write_text(f"{os.getpid()} {below.pid}")
    beside.rename(Path(folder, "pids"))
    time.sleep(600)
    return {}


def second_time(*, folder: str, threads: int, context: Context) -> dict[str, float]:
    """Wait to be killed the first time; end the second time."""
    context.warn("narrow")
    starts = len(list(Path(folder).glob("start*"))) + 1
    Path(folder, f"start{starts}").touch()
    if starts == 1:
        linger(folder=folder, threads=threads, context=context)
    return {"start": float(starts)}
