"""What the edgepress processes of one machine share by locks that die with their owner: the machine itself, and its GPUs.

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
    """Hold this machine, shared with other work or alone, among all edgepress processes of all users. Dies with its owner.

    Who wants it alone waits at the door, so that nobody else comes in meanwhile: work that goes on sharing it would never let go.
    is_cancelled  asked while others hold it; raises Cancelled when it says so
    """
    with open_lock(_lock_file("edgepress-machine.lock")) as machine:
        with open_lock(_lock_file("edgepress-machine-door.lock")) as door:
            _wait(door, is_cancelled)
            _wait(machine, is_cancelled, shared=not exclusive)
        yield


def visible_devices(device: str) -> list[str]:
    """What CUDA_VISIBLE_DEVICES can name on this machine, asked without torch; empty for a device that is not shared out (cpu, mps).

    As CUDA does, what follows the first name that is none (-1, nothing) is not seen.
    """
    if device.partition(":")[0] != "cuda":
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return list(takewhile(re.compile(r"\d|GPU-|MIG-").match, (name.strip() for name in named.split(","))))
    files = (re.fullmatch(r"nvidia(\d+)", file.name) for file in _DEV.glob("nvidia*"))
    return sorted((found[1] for found in files if found), key=int)


def default_device() -> str:
    """What `device: auto` means on this machine: cuda where NVIDIA's driver shows a GPU that torch can use, else cpu."""
    usable = (_DEV / "nvidiactl").exists() and visible_devices("cuda") and not why_no_cuda()
    return "cuda" if usable else "cpu"


def why_no_cuda() -> str:
    """Why torch cannot use `cuda` on this machine, asked without importing it; empty where nothing speaks against it."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None and not visible_devices("cuda"):
        return f"CUDA_VISIBLE_DEVICES={named!r} leaves no GPU"
    if not _torch_has_cuda():
        return "the installed torch is a build for the CPU"
    if not any((_DEV / driver).exists() for driver in _DRIVERS):
        return "there is no driver of a GPU (no /dev/nvidiactl)"
    return ""


def _torch_has_cuda() -> bool:
    """Whether the installed torch was built for GPUs: what its build wrote down, whatever the name of its version says. Does not import torch."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    built = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    return built["cuda"] is not None or built.get("hip") is not None


@contextmanager
def acquire_devices(device: str, count: int, is_cancelled: IsCancelled = lambda: False) -> Iterator[list[str]]:
    """Hold `count` GPUs among all edgepress processes of this machine; yields their names. Nothing to hold: none.

    A job that wants more than there are gets all, and says itself what it lacks. Several are taken by one at a time, so that no two wait
    for each other. Raises Cancelled when `is_cancelled` says so.
    """
    names = visible_devices(device)
    if not names:
        yield []
        return
    with ExitStack() as held:
        taken: list[str] = []
        with open_lock(_lock_file("edgepress-devices-door.lock")) as door:
            _wait(door, is_cancelled)
            while len(taken) < min(count, len(names)):
                if is_cancelled():
                    raise Cancelled()
                free = next((name for name in names if name not in taken and _held(name, held)), None)
                if free is None:
                    time.sleep(0.2)
                else:
                    taken.append(free)
        yield sorted(taken, key=names.index)  # whichever came free first


def _held(name: str, held: ExitStack) -> bool:
    """Take the lock of a GPU if it is free, until `held` ends."""
    with ExitStack() as attempt:
        handle = attempt.enter_context(open_lock(_lock_file(f"edgepress-device-{name.replace('/', '-')}.lock")))
        if try_acquire(handle):
            held.push(attempt.pop_all())
            return True
    return False


@contextmanager
def one_at_a_time(name: str) -> Iterator[None]:
    """Wait for the lock file `name` and hold it alone, among all threads and edgepress processes of all users. For what is short."""
    with file_lock(_lock_file(name)):
        yield


def _lock_file(name: str) -> Path:
    """A lock file of the machine. Raises EdgepressError where EDGEPRESS_LOCKS names no directory."""
    folder = Path(os.environ.get("EDGEPRESS_LOCKS") or tempfile.gettempdir())
    if not folder.is_dir():
        raise EdgepressError(f"EDGEPRESS_LOCKS={folder} is no directory; it is to be one that the containers of this host share, or unset")
    return folder / name


def _wait(handle: int, is_cancelled: IsCancelled, *, shared: bool = False) -> None:
    """Wait for a lock. Raises Cancelled when `is_cancelled` says so."""
    if not acquire(handle, shared=shared, is_cancelled=is_cancelled):
        raise Cancelled()
