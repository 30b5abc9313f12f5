"""Waiting for conditions with much patience: the machine may be slow and busy. On a quiet one nothing takes a tenth of it."""

import subprocess
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
PATIENCE = 600.0  # seconds; pytest's own limit for a test (pyproject.toml) is above it


def until(
    moment: Callable[[], T], explain: Callable[[], Any] = lambda: "the moment never came", process: "subprocess.Popen[Any] | None" = None
) -> T:
    """Wait until `moment` returns something true, and return that.

    explain  what to say when it never does
    process  one without which it cannot come: fails as soon as that has ended
    """
    deadline = time.monotonic() + PATIENCE
    while not (found := moment()):
        assert process is None or process.poll() is None, (explain(), process.communicate())
        assert time.monotonic() < deadline, explain()
        time.sleep(0.02)
    return found
