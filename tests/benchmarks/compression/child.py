"""What every measured process shares: its job, the clock, its peak memory, its answer. Runs in any environment: the standard library only.

A job is JSON on the standard input:
checkpoint, out   model directories, of which the second is new
windows           file of calibration token ids, JSON [count][length]
method            "gptq", "awq", "rtn", "sparsegpt", "wanda" or "magnitude"
bits, group_size, symmetric, sparsity   as far as the method has them
threads           of torch
answer            file for what was measured
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

Job = dict[str, Any]


def read_job() -> Job:
    return json.load(sys.stdin)


def read_windows(job: Job) -> list[list[int]]:
    return json.loads(Path(job["windows"]).read_text())


@contextmanager
def answered(job: Job, *distributions: str) -> Iterator[None]:
    """Time what runs inside, and write the seconds, the peak memory of the process until then and the versions of `distributions`."""
    started = time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    versions = {name: version(name) for name in distributions}
    Path(job["answer"]).write_text(json.dumps({"seconds": seconds, "peak_rss_mb": peak_rss_mb(), "versions": versions}))


def peak_rss_mb() -> float:
    """Peak resident memory in units of 10^6 bytes. Not getrusage: its figure begins with that of the process that started this one."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6
