"""Locks between processes: alone or shared, given back when their owner dies, whoever made the file."""

import errno
import fcntl
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compression.errors import EdgepressError
from compression.locks import acquire, file_lock, is_locked, open_lock, try_acquire, try_file_lock

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pathlib import Path
from compression.locks import file_lock
with file_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_dies_with_its_owner(tmp_path: Path) -> None:
    file = tmp_path / "x.lock"
    assert not is_locked(file)
    command = [sys.executable, "-P", "-c", HOLD, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "held\n"
        assert is_locked(file)
        with try_file_lock(file) as held:
            assert not held
        owner.kill()
    assert not is_locked(file)
    with try_file_lock(file) as held:
        assert held and is_locked(file)
    assert not is_locked(file)


def test_shared_locks_keep_an_exclusive_one_out(tmp_path: Path) -> None:
    file = tmp_path / "x.lock"
    with open_lock(file) as one, open_lock(file) as two, open_lock(file) as alone:
        assert acquire(one, shared=True) and try_acquire(two, shared=True)
        asked: list[bool] = []
        assert not acquire(alone, is_cancelled=lambda: len(asked) == 3 or asked.append(True) is not None)
        assert len(asked) == 3


def test_another_users_lock_file_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of others can neither be written nor, in a sticky directory, opened with O_CREAT; as root this must be acted."""
    file = tmp_path / "x.lock"
    before = os.umask(0o077)
    try:
        with file_lock(file):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    original = os.open

    def denied(path: Any, flags: int, *rest: Any) -> int:
        if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            raise PermissionError(path)
        return original(path, flags, *rest)

    monkeypatch.setattr(os, "open", denied)
    with file_lock(file):
        assert is_locked(file)


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", missing)
    with pytest.raises(EdgepressError, match=rf"{tmp_path}/x.lock: its file system has no file locks"), file_lock(tmp_path / "x.lock"):
        pass


def test_nothing_else_locks() -> None:
    sources = [file for package in ("compression", "export", "tasks", "flows") for file in (ROOT / package).rglob("*.py")]
    locking = {
        str(file.relative_to(ROOT)) for file in sources if re.search(r"\bflock\(|^from filelock|^import filelock", file.read_text(), re.M)
    }
    assert locking == {"compression/locks.py"}
