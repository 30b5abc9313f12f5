"""Who owns a run, told so that anyone can see later whether the owner still lives. Imports no torch."""

import os
import socket

import psutil


def owner_tag() -> str:
    """`host/pid/start time` of this process."""
    return f"{socket.gethostname()}/{os.getpid()}/{psutil.Process().create_time():.2f}"


def is_dead(tag: str) -> bool:
    """Whether the owner was a process of this machine that has ended. Owners on other machines are left alone."""
    host, pid, started = tag.rsplit("/", 2)
    if host != socket.gethostname():
        return False
    try:
        return abs(psutil.Process(int(pid)).create_time() - float(started)) > 1
    except psutil.NoSuchProcess:
        return True
