"""How much may run at once on one machine: cores and memory. Imports no torch."""

import bisect
import itertools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tasks.errors import Cancelled
from tasks.runners.executor import EventHandler, Job
from tasks.runners.machine import IsCancelled

PROCESS = 512 << 20
"""Bytes of a child that has torch loaded and nothing to work on."""


class Budget:
    """Cores and bytes of memory that jobs take and give back; a job that claims more than there is waits until it has all.

    Jobs that wait form a queue, in the order of the plan's stages, and of a stage as they came. Only the first takes what is free: no small job
    slips past one that needs the whole machine, which would never have it.

    Limits only how many run side by side, never a job's threads, which decide its bytes.
    """

    def __init__(self, cores: int | None = None, memory: int | None = None):
        """None: all of the machine (of the container, for memory)."""
        self.cores = cores or os.cpu_count() or 1
        self.memory = memory or machine_memory()
        self._free = {"cores": self.cores, "memory": self.memory}
        self._changed = threading.Condition()
        self._queue: list[tuple[int, int]] = []  # of each job that waits: its stage's place in the plan, and a number that grows
        self._numbers = itertools.count()

    @contextmanager
    def taken(self, job: Job, on_event: EventHandler, is_cancelled: IsCancelled) -> Iterator[None]:
        """Hold what a job claims. Raises Cancelled when `is_cancelled` says so (it is asked twice a second, and whenever `wake` is called)."""
        memory = job.memory + PROCESS
        if memory > self.memory:
            on_event(
                {"note": f"needs about {memory / 2**30:.1f} GiB of memory, and there are {self.memory / 2**30:.1f} GiB: it runs alone"}
            )
        claim = (
            {"cores": self.cores, "memory": self.memory}
            if job.exclusive
            else {"cores": min(job.threads, self.cores), "memory": min(memory, self.memory)}
        )
        with self._changed:
            place = (job.order, next(self._numbers))
            bisect.insort(self._queue, place)
            try:
                while self._queue[0] != place or any(self._free[name] < count for name, count in claim.items()):
                    if is_cancelled():
                        raise Cancelled()
                    self._changed.wait(0.5)
                for name, count in claim.items():
                    self._free[name] -= count
            finally:
                self._queue.remove(place)
                self._changed.notify_all()  # the next is the first now
        try:
            yield
        finally:
            with self._changed:
                for name, count in claim.items():
                    self._free[name] += count
                self._changed.notify_all()

    def wake(self) -> None:
        """Let everybody who waits ask again whether to give up."""
        with self._changed:
            self._changed.notify_all()


def machine_memory() -> int:
    """Bytes of memory of this machine, or of the container (cgroup v2) where that is less."""
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    total = psutil.virtual_memory().total
    return total if text == "max" else min(total, int(text))
