"""Energy and latency, with counters and clocks of which the truth is known."""

import json
import sys
import time
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from compression.context import Context
from compression.errors import EdgepressError
from compression.evaluation.energy import RaplCounter, measure_energy, nvml_counters, rapl_counters
from compression.evaluation.latency import NAMES, measure_latency
from tests.compression.evaluation.scripted import Scripted


def zone(powercap: Path, number: str, name: str, microjoules: int = 0) -> Path:
    folder = powercap / f"intel-rapl:{number}"
    folder.mkdir(parents=True)
    for file, content in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", 999_999)):
        (folder / file).write_text(f"{content}\n")
    return folder


class PowerMeter:
    """A counter that knows how many generations there were: 5 joules each."""

    name = "test meter"

    def __init__(self, runtime: Scripted):
        self.runtime = runtime

    def read(self) -> int:
        return len(self.runtime.prompts)

    def joules(self, since: int) -> float:
        return 5.0 * (self.read() - since)


def test_packages_and_memory_are_counted_and_what_lies_within_a_package_is_not(tmp_path: Path) -> None:
    for number, name in (("0", "package-0"), ("0:0", "core"), ("0:1", "dram"), ("1", "package-1"), ("2", "psys")):
        zone(tmp_path, number, name)
    assert [c.name for c in rapl_counters(tmp_path)] == ["RAPL package-0", "RAPL dram", "RAPL package-1"]
    assert rapl_counters(tmp_path / "none") == []


def test_a_counter_that_turned_over_still_counts(tmp_path: Path) -> None:
    folder = zone(tmp_path, "0", "package-0", 999_990)
    (counter,) = rapl_counters(tmp_path)
    before = counter.read()
    (folder / "energy_uj").write_text("15\n")
    assert counter.joules(before) == pytest.approx(25e-6)


def test_counters_that_may_not_be_read_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone(tmp_path, "0", "package-0")
    zone(tmp_path, "1", "package-1")

    def refuse(self: RaplCounter) -> int:
        raise PermissionError

    monkeypatch.setattr(RaplCounter, "read", refuse)
    assert rapl_counters(tmp_path) == []


def test_the_cpu_has_no_card() -> None:
    assert nvml_counters("cpu") == []


def test_energy_is_told_by_generation_and_by_token() -> None:
    runtime = Scripted(lambda _: "x" * 50)
    found = measure_energy(
        lambda: runtime, [1, 2, 3], new_tokens=10, device="cpu", estimate=True, context=Context(), seconds=0.05, found=[PowerMeter(runtime)]
    )
    assert found.metrics == {"energy_joules": pytest.approx(5), "energy_joules_per_token": pytest.approx(0.5)}
    assert found.details == {"energy": "test meter"}
    assert runtime.closed


def test_without_counters_there_is_nothing_unless_an_estimate_is_asked_for() -> None:
    def opened() -> Scripted:
        raise AssertionError("nothing is opened for nothing")

    assert not measure_energy(opened, [1], new_tokens=2, device="cpu", estimate=False, context=Context(), found=[]).metrics


def test_a_counter_that_stands_still_is_said_and_left_out() -> None:
    runtime, said = Scripted(lambda _: "x"), []
    meter = PowerMeter(Scripted(lambda _: ""))
    context = Context(warn=said.append)
    found = measure_energy(lambda: runtime, [1], new_tokens=2, device="cpu", estimate=False, context=context, seconds=0.01, found=[meter])
    assert not found.metrics
    assert "did not grow" in said[0]


def test_untimed_runtimes_and_senseless_settings(tmp_path: Path) -> None:
    untimed = Scripted(lambda _: "x", timed=False)
    assert not measure_energy(lambda: untimed, [1], new_tokens=2, device="cpu", estimate=True, context=Context(), found=[]).metrics
    assert measure_latency(untimed, [1]) == {}
    with pytest.raises(EdgepressError, match="energy needs a prompt"):
        measure_energy(lambda: untimed, [], new_tokens=2, device="cpu", estimate=True, context=Context())
    with pytest.raises(EdgepressError, match="latency needs a prompt"):
        measure_latency(untimed, [1], new_tokens=1)


def test_codecarbons_estimate_has_a_name_of_its_own_and_neither_calls_home_nor_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / ".codecarbon.config").write_text(
        "[codecarbon]\nsave_to_api=true\noutput_methods=csv,api\nemissions_endpoint=http://127.0.0.1:9/\nelectricitymaps_api_token=x\n"
    )
    called: list[str] = []

    def listen(event: str, arguments: tuple) -> None:
        if watching and event in ("socket.connect", "socket.getaddrinfo"):
            called.append(f"{event} {arguments}")

    watching = [True]
    sys.addaudithook(listen)  # it cannot be taken off again, so it stops listening
    runtime = Scripted(lambda _: time.sleep(0.01) or "x" * 50)
    found = measure_energy(lambda: runtime, [1, 2], new_tokens=10, device="cpu", estimate=True, context=Context(), seconds=1.2, found=[])
    watching.clear()
    assert found.metrics.keys() == {"energy_joules_estimated", "energy_joules_per_token_estimated"}
    per_second = found.metrics["energy_joules_estimated"] * (len(runtime.prompts) - 1) / 1.2
    assert 0.5 < per_second < 2000  # watts
    assert found.metrics["energy_joules_estimated"] == pytest.approx(10 * found.metrics["energy_joules_per_token_estimated"])
    assert found.details["energy"].startswith("codecarbon ")
    assert called == []
    assert sorted(p.name for p in tmp_path.iterdir()) == [".codecarbon.config"]


def test_latency_is_the_middle_and_the_tail_of_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    took = np.random.default_rng(0).exponential(size=(11, 8))
    clock, calls = [0.0], count()

    def perf_counter() -> float:
        number = next(calls)
        if number % 2:
            clock[0] += took.flat[number // 2]
        return clock[0]

    monkeypatch.setattr("compression.evaluation.latency.time.perf_counter", perf_counter)
    monkeypatch.setattr("compression.evaluation.latency.least_contended", lambda timed: (timed(), 0.25))
    found = measure_latency(Scripted(lambda _: "abcdefgh", max_length=12), [1, 2, 3, 4, 5, 6], new_tokens=8, repeats=10)
    kept = took[1:]  # the first round warms up
    expected = [*np.percentile(kept[:, 0], (50, 95)), *np.percentile(kept[:, 1:], (50, 95))]
    assert [found[name] for name in NAMES] == pytest.approx(expected)
    assert found["latency_cpu_wait_share"] == 0.25
    assert json.dumps(found)
