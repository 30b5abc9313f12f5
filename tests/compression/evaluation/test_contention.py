"""What is timed while others take the cores: seen, and timed again."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from compression.evaluation import contention
from compression.evaluation.contention import least_contended

REPOSITORY = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("shares", "call", "share"),
    [([0.05], 1, 0.05), ([3.0, 0.0], 2, 0.0), ([3.0, 2.0, 0.5, 1.0], 3, 0.5), ([None], 1, None)],
    ids=["quiet", "quiet the second time", "never quiet", "the kernel does not tell"],
)
def test_the_quietest_call_counts(monkeypatch: pytest.MonkeyPatch, shares: list[float | None], call: int, share: float | None) -> None:
    told = list(shares)
    calls = iter(range(1, 9))

    def told_share(timed: Callable[[], int]) -> tuple[int, float | None]:
        return timed(), told.pop(0)

    monkeypatch.setattr(contention, "_share_of_waiting", told_share)
    monkeypatch.setattr(contention.time, "sleep", lambda _: None)
    assert least_contended(lambda: next(calls)) == (call, share)
    assert told == []


def test_what_takes_long_is_not_timed_again_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contention, "_share_of_waiting", lambda timed: (timed(), 0.9))
    monkeypatch.setattr(contention, "_PATIENCE", -1.0)
    calls = iter(range(9))
    assert least_contended(lambda: next(calls)) == (0, 0.9)


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this kernel does not count how long threads wait")
def test_waiting_for_a_core_that_others_take_is_seen() -> None:
    """A process and another one that computes all the time, both on one core: each waits about half of the time."""
    code = (
        "import os, subprocess, sys, time\nfrom compression.evaluation.contention import _share_of_waiting\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nbusy = subprocess.Popen([sys.executable, '-c', 'print(1, flush=True)\\nwhile True: pass'], stdout=subprocess.PIPE)\n"
        "busy.stdout.readline()\nend = time.monotonic() + 1\n"
        "def spin():\n    while time.monotonic() < end: pass\n"
        "print(_share_of_waiting(spin)[1])\nbusy.kill()\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert 0.2 < float(told.stdout) < 1.1
