"""What a stage takes of its machine while it works: sampled in the child, and in its own children, wherever that runs. Imports no torch."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

_FIRST, _EVERY = 1.0, 5.0  # seconds


@contextmanager
def sampled(tell: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """While the block runs, tell every few seconds what this process and its descendants take, as {"system": figures, "time": Unix time}."""
    ended = threading.Event()
    sampler = threading.Thread(target=_sample, args=[tell, ended], daemon=True, name="sampler")
    sampler.start()
    try:
        yield
    finally:
        ended.set()
        sampler.join()


def _sample(tell: Callable[[dict[str, Any]], None], ended: threading.Event) -> None:
    before = _taken()
    pause = _FIRST
    while not ended.wait(pause):
        now = _taken()
        tell({"system": figures(before, now), "time": time.time()})
        before, pause = now, _EVERY


def _taken() -> dict[str, float]:
    """Totals of the process and its descendants until now; `at` is the clock. A process that ends meanwhile counts no more."""
    own = psutil.Process()
    taken = {"at": time.monotonic(), "cpu": 0.0, "rss": 0.0, "read": 0.0, "written": 0.0}
    for process in [own, *own.children(recursive=True)]:
        with suppress(psutil.Error), process.oneshot():
            times, memory = process.cpu_times(), process.memory_info()
            taken["cpu"] += times.user + times.system
            taken["rss"] += memory.rss
            if hasattr(process, "io_counters"):  # macOS has none
                counters = process.io_counters()
                taken["read"] += counters.read_bytes
                taken["written"] += counters.write_bytes
    return taken


def figures(before: dict[str, float], now: dict[str, float]) -> dict[str, float]:
    """Between two looks: cores in use as a percentage (200 is two cores), resident memory in MB, MB a second from and to the disk; of GPUs what NVML tells."""
    seconds = max(now["at"] - before["at"], 1e-3)
    return {
        "cpu_percent": 100 * max(0.0, now["cpu"] - before["cpu"]) / seconds,
        "memory_mb": now["rss"] / 1e6,
        "disk_read_mb_per_second": max(0.0, now["read"] - before["read"]) / 1e6 / seconds,
        "disk_written_mb_per_second": max(0.0, now["written"] - before["written"]) / 1e6 / seconds,
        "machine_memory_available_mb": psutil.virtual_memory().available / 1e6,
        **_gpus(),
    }


def _gpus() -> dict[str, float]:
    """Utilization and memory of every GPU, where NVML is there, and each that it tells."""
    try:
        import pynvml
    except ImportError:
        return {}
    found: dict[str, float] = {}
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            with suppress(pynvml.NVMLError):  # a GPU that was lost, or is another's
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                with suppress(pynvml.NVMLError):  # a part of a GPU (MIG) tells no utilization
                    found[f"gpu_{index}_percent"] = float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
                found[f"gpu_{index}_memory_mb"] = pynvml.nvmlDeviceGetMemoryInfo(handle).used / 1e6
    return found
