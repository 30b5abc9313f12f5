"""Whether other programs take the cores from what is timed.

Locks keep other work of edgepress away, but nobody else's. On a machine that others keep busy a model seems slower than it is, many times where
its threads wait for each other (docs/evaluation.md says how to see it). So the kernel is asked how long our threads waited for a core.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

CROWDED = 0.1  # a share of waiting above this makes figures doubtful: a tenth is what a stage must lose to be called slower
_TRIES, _PATIENCE = 4, 30.0  # seconds

Timed = TypeVar("Timed")


def least_contended(timed: Callable[[], Timed]) -> tuple[Timed, float | None]:
    """What `timed` returned when it was called in peace, or in the most peaceful of up to four calls within half a minute.

    Second comes the share of waiting: how long threads of this process were ready to run and had no core, in units of the time that the call
    took; 0 on a quiet machine, above CROWDED on a busy one, above 1 where several threads waited. None where the kernel does not tell.
    """
    begin = time.monotonic()
    tries: list[tuple[float, Timed]] = []
    while True:
        result, share = _share_of_waiting(timed)
        if share is None:
            return result, None
        tries.append((share, result))
        if share <= CROWDED or len(tries) == _TRIES or time.monotonic() - begin > _PATIENCE:
            share, result = min(tries, key=lambda one: one[0])
            return result, share
        time.sleep(0.5)


def _share_of_waiting(timed: Callable[[], Timed]) -> tuple[Timed, float | None]:
    before, begin = _waited_seconds(), time.monotonic()
    result = timed()
    after, end = _waited_seconds(), time.monotonic()
    return result, None if before is None or after is None else max(0.0, after - before) / (end - begin)


def _waited_seconds() -> float | None:
    """Seconds that the living threads of this process have been ready to run without a core; None where the kernel does not count (not Linux, gVisor)."""
    if not Path("/proc/self/schedstat").exists():
        return None
    waited = 0
    for thread in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended this instant
            waited += int(thread.read_text().split()[1])  # nanoseconds (the kernel's Documentation/scheduler/sched-stats.rst)
    return waited / 1e9
