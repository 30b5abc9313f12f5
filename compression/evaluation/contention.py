"""Notice other programs that use the cores during a timing.

Locks keep other work of edgepress away, but no other program. On a busy machine a model seems slower than it is, many times where
its threads wait for each other (docs/evaluation.md says how to see it). The kernel counts how long our threads waited for a core.
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
    """Call `timed` until the machine is quiet, up to four times within half a minute.

    Returns:
        The result of the quietest call, and its share of waiting: how long threads of this process were ready to run and had no core, divided
        by the duration of the call; 0 on a quiet machine, above CROWDED on a busy one, above 1 where several threads waited. None where the
        kernel does not count.
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
    """Return the seconds that the living threads of this process were ready to run without a core; None where the kernel does not count (not Linux, gVisor)."""
    if not Path("/proc/self/schedstat").exists():
        return None
    waited = 0
    for thread in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended this instant
            waited += int(thread.read_text().split()[1])  # nanoseconds (the kernel's Documentation/scheduler/sched-stats.rst)
    return waited / 1e9
