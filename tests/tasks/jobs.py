"""What the children of tests/tasks/test_children.py are asked to do."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from compression.context import Context
from compression.errors import Incompatible


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
