"""Locks that the edgepress processes of one machine share: of the machine itself, and of its GPUs. They die with their owner.

The lock files are in the temporary directory; containers of one host, each of which has one of its own, share a folder that EDGEPRESS_LOCKS names.
"""

import os
import re
import runpy
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path

from compression.errors import EdgepressError
from compression.locks import acquire, file_lock, open_lock, try_acquire
from tasks.errors import Cancelled

IsCancelled = Callable[[], bool]

_DEV = Path("/dev")
_DRIVERS = ("nvidiactl", "nvmap", "dxg", "kfd")  # NVIDIA's, also on Jetson and under WSL; AMD's, whose GPUs torch calls cuda too


@contextmanager
def machine_lock(*, exclusive: bool, is_cancelled: IsCancelled = lambda: False) -> Iterator[None]:
    """Hold the lock of this machine, shared or exclusive, among all edgepress processes of all users.

    A process that wants it exclusively holds the lock of the door while it waits, so that no other comes in: otherwise shared work could follow
    shared work for ever.

    Args:
        exclusive: Whether nothing else may run meanwhile.
        is_cancelled: Called again and again while others hold it.

    Raises:
        Cancelled: `is_cancelled` returned True.
    """
    with open_lock(_lock_file("edgepress-machine.lock")) as machine:
        with open_lock(_lock_file("edgepress-machine-door.lock")) as door:
            _wait(door, is_cancelled)
            _wait(machine, is_cancelled, shared=not exclusive)
        yield


def visible_devices(device: str) -> list[str]:
    """Return the names that CUDA_VISIBLE_DEVICES can hold on this machine; none for a device that is not divided (cpu, mps). Imports no torch.

    As in CUDA, names behind the first invalid one (-1, an empty one) do not count.
    """
    if device.partition(":")[0] != "cuda":
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return list(takewhile(re.compile(r"\d|GPU-|MIG-").match, (name.strip() for name in named.split(","))))
    files = (re.fullmatch(r"nvidia(\d+)", file.name) for file in _DEV.glob("nvidia*"))
    return sorted((found[1] for found in files if found), key=int)


def default_device() -> str:
    """Return what `device: auto` means on this machine: cuda where NVIDIA's driver shows a GPU that torch can use, else cpu."""
    usable = (_DEV / "nvidiactl").exists() and visible_devices("cuda") and not why_no_cuda()
    return "cuda" if usable else "cpu"


def why_no_cuda() -> str:
    """Return why torch cannot use `cuda` on this machine, or an empty text. Imports no torch."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None and not visible_devices("cuda"):
        return f"CUDA_VISIBLE_DEVICES={named!r} leaves no GPU"
    if not _torch_has_cuda():
        return "the installed torch is a build for the CPU"
    if not any((_DEV / driver).exists() for driver in _DRIVERS):
        return "there is no driver of a GPU (no /dev/nvidiactl)"
    return ""


def _torch_has_cuda() -> bool:
    """Whether the installed torch was built for GPUs, by what its build wrote down: the name of its version may not say so. Imports no torch."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    built = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    return built["cuda"] is not None or built.get("hip") is not None


@contextmanager
def acquire_devices(device: str, count: int, is_cancelled: IsCancelled = lambda: False) -> Iterator[list[str]]:
    """Lock GPUs among all edgepress processes of this machine; yield their names, none where the device is not divided.

    Only one process at a time acquires several, so that no two wait for each other.

    Args:
        device: The device of a job.
        count: How many. A job that wants more than there are gets all, and reports itself what it lacks.
        is_cancelled: Called again and again while others hold them.

    Raises:
        Cancelled: `is_cancelled` returned True.
    """
    names = visible_devices(device)
    if not names:
        yield []
        return
    with ExitStack() as locks:
        acquired: list[str] = []
        with open_lock(_lock_file("edgepress-devices-door.lock")) as door:
            _wait(door, is_cancelled)
            while len(acquired) < min(count, len(names)):
                if is_cancelled():
                    raise Cancelled()
                free = next((name for name in names if name not in acquired and _try_lock_device(name, locks)), None)
                if free is None:
                    time.sleep(0.2)
                else:
                    acquired.append(free)
        yield sorted(acquired, key=names.index)  # whichever came free first


def _try_lock_device(name: str, locks: ExitStack) -> bool:
    """Acquire the lock of a GPU if it is free, until `locks` ends."""
    with ExitStack() as attempt:
        handle = attempt.enter_context(open_lock(_lock_file(f"edgepress-device-{name.replace('/', '-')}.lock")))
        if try_acquire(handle):
            locks.push(attempt.pop_all())
            return True
    return False


@contextmanager
def one_at_a_time(name: str) -> Iterator[None]:
    """Hold the lock file `name` among all threads and edgepress processes of all users, for a short block."""
    with file_lock(_lock_file(name)):
        yield


def _lock_file(name: str) -> Path:
    """A lock file of the machine. Raises EdgepressError where EDGEPRESS_LOCKS names no directory."""
    folder = Path(os.environ.get("EDGEPRESS_LOCKS") or tempfile.gettempdir())
    if not folder.is_dir():
        raise EdgepressError(f"EDGEPRESS_LOCKS={folder} is not a directory; name one that the containers of this host share, or unset it")
    return folder / name


def _wait(handle: int, is_cancelled: IsCancelled, *, shared: bool = False) -> None:
    """Wait for a lock. Raises Cancelled where `is_cancelled` returns True."""
    if not acquire(handle, shared=shared, is_cancelled=is_cancelled):
        raise Cancelled()
