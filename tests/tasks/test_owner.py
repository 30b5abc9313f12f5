import os
import subprocess
import sys

import psutil
import pytest

from tasks.store.owner import is_dead, owner_tag


def test_owner_lives_with_its_process() -> None:
    code = "from tasks.store.owner import owner_tag; print(owner_tag(), flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    tag = process.stdout.readline().strip()
    assert not is_dead(tag) and not is_dead(owner_tag())
    process.communicate("\n")
    assert is_dead(tag)


def test_reused_process_id_is_another_owner() -> None:
    host, pid, started = owner_tag().rsplit("/", 2)
    assert pid == str(os.getpid()) and is_dead(f"{host}/{pid}/{started}0")
    assert not is_dead(f"elsewhere-{host}/{pid}/{started}0")  # nobody here knows


def test_owner_ignores_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of day at which a process began is that of the boot plus its ticks, and the kernel moves the former with the clock."""
    tag = owner_tag()
    monkeypatch.setattr(psutil.Process, "create_time", lambda _: 0.0)
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert not is_dead(tag)
