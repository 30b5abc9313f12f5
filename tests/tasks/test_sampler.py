"""What a stage takes of its machine, sampled while it works."""

import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from tasks.runners.sampler import figures, sampling


def test_figures_are_rates() -> None:
    before = {"at": 10.0, "cpu": 3.0, "rss": 1e6, "read": 0.0, "written": 5e6}
    now = {"at": 12.0, "cpu": 6.0, "rss": 3e6, "read": 4e6, "written": 5e6}
    found = figures(before, now)
    assert [found[name] for name in ("cpu_percent", "memory_mb", "disk_read_mb_per_second", "disk_written_mb_per_second")] == [150, 3, 2, 0]
    gone = figures(before, {**now, "cpu": 1.0, "read": -1.0})  # a child that took much has ended
    assert gone["cpu_percent"] == gone["disk_read_mb_per_second"] == 0


def test_busy_block_is_sampled_until_its_end() -> None:
    samples: list[dict[str, Any]] = []
    before = time.time()
    with sampling(samples.append, first=0.3, interval=0.1):
        while not samples:  # busy until it is seen
            pass
    count = len(samples)
    time.sleep(0.3)
    assert 1 <= count == len(samples)
    assert max(event["system"]["cpu_percent"] for event in samples) > 0 and all(event["system"]["memory_mb"] > 10 for event in samples)
    assert before <= samples[-1]["time"] <= time.time()


class NVMLError(Exception):
    pass


def of_gpu(figure: str) -> Any:
    """What a GPU of NVML tells: number 1 is lost, and number 2 a part that tells no utilization."""

    def samples(handle: int) -> Any:
        if handle == 2 and figure == "gpu":
            raise NVMLError("Not Supported")
        return SimpleNamespace(**{figure: 50_000_000 if figure == "used" else 50})

    return samples


def handle_of(index: int) -> int:
    if index == 1:
        raise NVMLError("GPU is lost")
    return index


@pytest.mark.parametrize("count", [3, None])
def test_gpu_without_figures_is_tolerated(count: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def counted() -> int:
        if count is None:
            raise NVMLError("Unknown Error")
        return count

    library = SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetCount=counted, nvmlDeviceGetHandleByIndex=handle_of,
        nvmlDeviceGetUtilizationRates=of_gpu("gpu"), nvmlDeviceGetMemoryInfo=of_gpu("used"),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", library)
    look = {"at": 1.0, "cpu": 0.0, "rss": 0.0, "read": 0.0, "written": 0.0}
    found = {name: value for name, value in figures(look, look).items() if name.startswith("gpu")}
    assert found == ({"gpu_0_percent": 50.0, "gpu_0_memory_mb": 50.0, "gpu_2_memory_mb": 50.0} if count else {})
