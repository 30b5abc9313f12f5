"""Who owns a run, told so that anyone can see later whether the owner still lives. Imports no torch."""

import os
import socket
from pathlib import Path

import psutil


def owner_tag() -> str:
    """`host/pid/start` of this process."""
    return f"{socket.gethostname()}/{os.getpid()}/{_start(os.getpid())}"


def is_dead(tag: str) -> bool:
    """Whether the owner was a process of this machine that has ended. Owners on other machines are left alone."""
    host, pid, started = tag.rsplit("/", 2)
    if host != socket.gethostname():
        return False
    try:
        return _start(int(pid)) != started
    except (ProcessLookupError, FileNotFoundError, psutil.NoSuchProcess):
        return True


def _start(pid: int) -> str:
    """What tells a process from others that had its id: the boot and its ticks since then. Its time of day would move with the clock.

    Raises ProcessLookupError, FileNotFoundError or psutil.NoSuchProcess where there is no such process.
    """
    proc = Path("/proc")
    if not (proc / "self" / "stat").exists():
        return f"{psutil.Process(pid).create_time():.2f}"
    ticks = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[19]  # field 22; the name before may hold anything
    return f"{(proc / 'sys/kernel/random/boot_id').read_text()[:8]}+{ticks}"
