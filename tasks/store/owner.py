"""Tags that name a process, so that other processes can check later whether it still lives. Imports no torch."""

import os
import socket
from pathlib import Path

import psutil


def owner_tag() -> str:
    """Return `host/pid/start` of this process."""
    return f"{socket.gethostname()}/{os.getpid()}/{_start(os.getpid())}"


def is_dead(tag: str) -> bool:
    """Return whether a tag names a process of this machine that has ended; False for every process of another machine."""
    host, pid, start = tag.rsplit("/", 2)
    if host != socket.gethostname():
        return False
    try:
        return _start(int(pid)) != start
    except (ProcessLookupError, FileNotFoundError, psutil.NoSuchProcess):
        return True


def _start(pid: int) -> str:
    """Return what distinguishes a process from earlier ones with its id: the boot, and its ticks since then.

    The time of day at which it began would move with the clock. Raises ProcessLookupError, FileNotFoundError or psutil.NoSuchProcess where
    no such process lives.
    """
    proc = Path("/proc")
    if not (proc / "self" / "stat").exists():
        return f"{psutil.Process(pid).create_time():.2f}"
    ticks = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[19]  # field 22; the name before it may hold any character
    return f"{(proc / 'sys/kernel/random/boot_id').read_text()[:8]}+{ticks}"
