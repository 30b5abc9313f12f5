"""Locks between processes: the kernel's, on files (flock), so they die with their owner (and what it forked). Imports no torch.

The package filelock does not serve: it has no lock that several hold at once, it must be able to write to the file, which is denied for
another user's in the temporary directory, and where flock is missing it makes do with a file that outlives a killed owner.

On a network file system (NFS 4) these locks hold between machines.
"""

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from compression.errors import EdgepressError

_POLL = 0.05  # seconds between tries while the wait can be cancelled


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold the exclusive lock of a file, among all processes and threads; wait while another holds it."""
    with open_lock(path) as handle:
        acquire(handle)
        yield


@contextmanager
def try_file_lock(path: Path) -> Iterator[bool]:
    """Hold the exclusive lock of a file if it is free; yield whether it was."""
    with open_lock(path) as handle:
        yield try_acquire(handle)


def is_locked(path: Path) -> bool:
    """Return whether any process holds the lock of a file; a file that does not exist is free."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not try_acquire(handle, shared=True)
    finally:
        os.close(handle)


@contextmanager
def open_lock(path: Path) -> Iterator[int]:
    """Open a lock file, and create it if it is missing. The end of the block releases what it acquired.

    Other users may lock the file too: everybody can read it, and that is enough on a local disk. NFS wants it open for writing.
    """
    handle = _opened(path)
    try:
        yield handle
    finally:
        os.close(handle)


def _opened(path: Path) -> int:
    while True:
        try:
            return os.open(path, os.O_RDWR)  # not with O_CREAT, which a sticky directory denies for another user's file
        except PermissionError:
            return os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            try:
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                continue  # somebody else made it meanwhile
            os.fchmod(handle, os.fstat(handle).st_mode | 0o444)  # whatever the umask
            return handle


def acquire(handle: int, *, shared: bool = False, is_cancelled: Callable[[], bool] | None = None) -> bool:
    """Wait for the lock of an open file, exclusive or `shared`; return False if `is_cancelled` returns True meanwhile.

    Raises EdgepressError where the file system has no locks.
    """
    if is_cancelled is None:
        _flock(handle, _how(shared))
        return True
    while not try_acquire(handle, shared=shared):
        if is_cancelled():
            return False
        time.sleep(_POLL)
    return True


def try_acquire(handle: int, *, shared: bool = False) -> bool:
    """Acquire the lock of an open file if it is free; return whether it was."""
    try:
        _flock(handle, _how(shared) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _flock(handle: int, how: int) -> None:
    try:
        fcntl.flock(handle, how)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        name = Path(f"/proc/self/fd/{handle}")
        file = name.readlink() if name.is_symlink() else "a lock file"
        raise EdgepressError(
            f"{file}: its file system has no file locks ({error.strerror}), without which two runs would spoil each other's results; "
            "use a --store (or EDGEPRESS_LOCKS, or MLFLOW_TRACKING_URI) on one that has them"
        ) from error


def _how(shared: bool) -> int:
    return fcntl.LOCK_SH if shared else fcntl.LOCK_EX
