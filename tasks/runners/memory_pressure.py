"""Whether the kernel killed a process because memory ran out. Only the kernel's counters show it, not the exit status. Imports no torch."""

import re
from collections.abc import Callable
from pathlib import Path

from tasks.runners.budget import machine_memory

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def out_of_memory_kills(pid: int | str = "self") -> int | None:
    """Return how many processes the kernel has killed for want of memory: in the cgroup of a process, or on this machine where that keeps no count.

    Linux counts them in `memory.events` (cgroup v2), `memory.oom_control` (v1) and `/proc/vmstat`. None where nothing does.
    """
    for file in (*_counters_of(pid), _PROC / "vmstat"):
        try:
            found = re.search(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE)
        except OSError:  # not this version, or not of this cgroup
            continue
        if found:
            return int(found[1])
    return None


def _counters_of(pid: int | str) -> list[Path]:
    try:
        lines = (_PROC / str(pid) / "cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return []
    found = []
    for _, controllers, group in (line.split(":", 2) for line in lines):
        if not controllers:
            found.append(_CGROUPS / group.lstrip("/") / "memory.events")
        elif controllers == "memory":
            below = _CGROUPS / "memory"
            found += [below / group.lstrip("/") / "memory.oom_control", below / "memory.oom_control"]  # the second in a container
    return found


class MemoryWatch:
    """Watches a process from its start, so that its death by SIGKILL can be explained.

    Call `look` again and again: the kernel forgets a process's peak with the process.
    """

    def __init__(self, pid: int, killed: Callable[[], int | None] = out_of_memory_kills):
        self._status, self._killed, self._before = _PROC / str(pid) / "status", killed, killed()
        self.peak = 0  # bytes

    def look(self) -> None:
        """Note the largest memory that the process has had."""
        try:
            found = re.search(r"^VmHWM:\s+(\d+) kB$", self._status.read_text(), re.MULTILINE)
        except OSError:  # it has ended, or there is no /proc
            return
        if found:
            self.peak = max(self.peak, int(found[1]) * 1024)

    def why(self) -> str:
        """Return what killed the process with SIGKILL, as far as this machine knows."""
        peak = f"; it held {self.peak / 2**30:.2f} GiB when last seen, of {machine_memory() / 2**30:.2f} GiB" if self.peak else ""
        after = self._killed()
        if self._before is None or after is None:
            return f"killed by SIGKILL (this system keeps no count of out-of-memory kills, so memory may have run out or not{peak})"
        if after > self._before:
            return f"killed by the kernel because memory ran out (SIGKILL{peak}; `execution: {{memory_gib: …}}` limits what runs at once)"
        return f"killed by SIGKILL (from outside: the kernel's count of out-of-memory kills did not move{peak})"
