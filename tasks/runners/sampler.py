"""Samples of cores, memory, disk and GPUs that a stage uses: of its child and that child's children. Imports no torch."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil


@contextmanager
def sampling(on_sample: Callable[[dict[str, Any]], None], first: float = 1.0, interval: float = 5.0) -> Iterator[None]:
    """While the block runs, pass on every few seconds what this process and its descendants use, as {"system": figures, "time": Unix time}."""
    ended = threading.Event()
    sampler = threading.Thread(target=_sample, args=[on_sample, ended, first, interval], daemon=True, name="sampler")
    sampler.start()
    try:
        yield
    finally:
        ended.set()
        sampler.join()


def _sample(on_sample: Callable[[dict[str, Any]], None], ended: threading.Event, pause: float, interval: float) -> None:
    before = _totals()
    while not ended.wait(pause):
        now = _totals()
        on_sample({"system": figures(before, now), "time": time.time()})
        before, pause = now, interval


def _totals() -> dict[str, float]:
    """Totals of the process and its descendants until now; `at` is the clock. A process that ends meanwhile no longer counts."""
    process_itself = psutil.Process()
    totals = {"at": time.monotonic(), "cpu": 0.0, "rss": 0.0, "read": 0.0, "written": 0.0}
    for process in [process_itself, *process_itself.children(recursive=True)]:
        with suppress(psutil.Error), process.oneshot():
            times, memory = process.cpu_times(), process.memory_info()
            totals["cpu"] += times.user + times.system
            totals["rss"] += memory.rss
            if hasattr(process, "io_counters"):  # macOS has none
                counters = process.io_counters()
                totals["read"] += counters.read_bytes
                totals["written"] += counters.write_bytes
    return totals


def figures(before: dict[str, float], now: dict[str, float]) -> dict[str, float]:
    """Return the use between two totals: cores in percent (200 is two cores), resident memory in MB, disk in MB/s; of GPUs what NVML reports."""
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
    """Utilization and memory of every GPU, as far as NVML reports them."""
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
                with suppress(pynvml.NVMLError):  # a part of a GPU (MIG) reports no utilization
                    found[f"gpu_{index}_percent"] = float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
                found[f"gpu_{index}_memory_mb"] = pynvml.nvmlDeviceGetMemoryInfo(handle).used / 1e6
    return found
