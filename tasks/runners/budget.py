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
"""Bytes of a child that has loaded torch and does nothing."""


class Budget:
    """Cores and bytes of memory that jobs acquire and release; a job that claims more than there is waits until it has everything.

    Jobs that wait form a queue, in the order of the plan's stages, and within a stage as they came. Only the first acquires what is free: otherwise
    small jobs would overtake one that needs the entire machine for ever.

    The budget limits how many jobs run at once, never a job's threads, which decide its bytes.
    """

    def __init__(self, cores: int | None = None, memory: int | None = None):
        """Limit cores and bytes of memory; None: those of the machine (of the container, for memory)."""
        self.cores = cores or os.cpu_count() or 1
        self.memory = memory or machine_memory()
        self._free = {"cores": self.cores, "memory": self.memory}
        self._changed = threading.Condition()
        self._queue: list[tuple[int, int]] = []  # of each job that waits: its stage's place in the plan, and a growing number
        self._numbers = itertools.count()

    @contextmanager
    def acquire(self, job: Job, on_event: EventHandler, is_cancelled: IsCancelled) -> Iterator[None]:
        """Reserve what a job claims while the block runs.

        Args:
            job: The job.
            on_event: Gets a note where the job claims more memory than there is.
            is_cancelled: Called twice a second while the job waits, and at every `wake`.

        Raises:
            Cancelled: `is_cancelled` returned True.
        """
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
        """Have all jobs that wait check at once whether they are cancelled."""
        with self._changed:
            self._changed.notify_all()


def machine_memory() -> int:
    """Return the bytes of memory of this machine, or of the container (cgroup v2) where that is less."""
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    total = psutil.virtual_memory().total
    return total if text == "max" else min(total, int(text))
