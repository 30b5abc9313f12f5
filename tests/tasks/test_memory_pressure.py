"""Why a process was killed, by the kernel's counters. A real kill: tests/flows/test_faults.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tasks.runners.memory_pressure
from tasks.runners.budget import machine_memory
from tasks.runners.memory_pressure import MemoryWatch, out_of_memory_kills


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ((3, 4), "because memory ran out"),
        ((3, 3), "from outside"),
        ((None, None), "keeps no count"),
    ],
)
def test_reason_follows_kernels_counter(counts: tuple[int | None, int | None], reason: str) -> None:
    readings = iter(counts)
    assert reason in MemoryWatch(0, lambda: next(readings)).why()


def test_reason_has_peak_memory() -> None:
    code = "held = bytearray(300 << 20); print('held', flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    watch = MemoryWatch(process.pid, lambda: 0)
    watch.look()
    process.communicate("\n")
    watch.look()  # after its end too
    assert 300 << 20 < watch.peak < 500 << 20
    assert f"{watch.peak / 2**30:.2f} GiB" in watch.why() and f"of {machine_memory() / 2**30:.2f} GiB" in watch.why()


V2, V1 = "0::/user.slice/a.scope\n", "7:cpu:/\n4:memory:/docker/abc\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (V2, {"user.slice/a.scope/memory.events": "low 0\noom 2\noom_kill 1\noom_group_kill 0\n"}, 1),
        (V1, {"memory/docker/abc/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n"}, 5),
        (V1, {"memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 6\n"}, 6),
    ],
)
def test_count_is_of_processs_cgroup(
    groups: str, files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "cgroup").write_text(groups)
    monkeypatch.setattr(tasks.runners.memory_pressure, "_CGROUPS", tmp_path)
    monkeypatch.setattr(tasks.runners.memory_pressure, "_PROC", tmp_path)
    (tmp_path / "self").mkdir()
    (tmp_path / "cgroup").rename(tmp_path / "self" / "cgroup")
    (tmp_path / "vmstat").write_text("pgfault 1\noom_kill 77\n")
    assert out_of_memory_kills() == expected
    for name in files:
        (tmp_path / name).unlink()
    assert out_of_memory_kills() == 77  # of the machine, where the cgroup counts none
    (tmp_path / "vmstat").unlink()
    assert out_of_memory_kills() is None


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels keep no such count")
def test_this_machine_counts() -> None:
    assert isinstance(out_of_memory_kills(os.getpid()), int)
