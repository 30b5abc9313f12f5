from typing import Any

import pytest

from tests.benchmarks.bench_demo import demo_table, orchestration_share, render, time_table


def row(stage: str, state: str, computed: bool, seconds: float, measure_seconds: float, **metrics: float) -> dict[str, Any]:
    return {
        "stage": stage, "runtime": "transformers", "state": state, "computed": computed, "seconds": seconds,
        "measure_seconds": measure_seconds, "metrics": metrics,
    }  # fmt: skip


def summary(*rows: dict[str, Any]) -> dict[str, Any]:
    machine = {"host": "h", "processor": "Some CPU", "cores": 2, "memory_gib": 8}
    return {
        "name": "demo", "started": 86400.0, "seconds": 70.0, "rows": list(rows),
        "environment": {"edgepress": "0.1.0", "machine": machine, "device": "cpu", "threads": 2},
    }  # fmt: skip


FIRST = summary(
    row("base", "Completed", False, 9.0, 8.0, accuracy=0.94, parameters=4_000_000.0),
    row("pruned", "Completed", True, 3.0, 7.0, accuracy=0.5, parameters=3_000_000.0, size_mb=6.0),
    row("distilled", "Completed", True, 50.0, 2.0, accuracy=0.9),
)


def test_the_table_holds_what_was_measured_and_nothing_else():
    lines = demo_table(FIRST).splitlines()
    assert lines[0] == "| stage | runtime | accuracy | size MB | params M | s | state |"
    assert lines[1] == "| --- | --- | ---: | ---: | ---: | ---: | --- |"
    assert lines[3] == "| pruned | transformers | 0.500 | 6.00 | 3.00 | 3.0 | completed |"
    assert len(lines) == 5


def test_time_is_split_into_computing_and_measuring():
    lines = time_table(FIRST["rows"], 100.0).splitlines()
    assert lines[2:] == ["| base | 0.0 | 8.0 | 8.0% |", "| pruned | 3.0 | 7.0 | 10.0% |", "| distilled | 50.0 | 2.0 | 52.0% |"]


def test_orchestration_is_what_the_children_did_not_use():
    # 8 s of the base, whose own seconds are the same ones; 3 + 7 s; 50 + 2 s
    assert orchestration_share(FIRST["rows"], 100.0) == pytest.approx(0.30)
    cached = [{**row, "computed": False, "state": "Cached"} for row in FIRST["rows"]]
    assert orchestration_share(cached, 20.0) == pytest.approx(3 / 20)


def test_overlapping_stages_have_no_share():
    with pytest.raises(ValueError, match=r"70\.0, and the command took 60\.0"):
        orchestration_share(FIRST["rows"], 60.0)


def test_the_part_of_the_page():
    second = summary(*({**row, "computed": False, "state": "Cached", "measure_seconds": 0.1} for row in FIRST["rows"]))
    page = render(FIRST, 80.0, second, 12.4)
    assert "on 1970-01-02: Some CPU, 2 cores, 8 GiB of memory, device cpu, 2 threads a stage, edgepress 0.1.0." in page
    assert demo_table(FIRST) in page and time_table(FIRST["rows"], 80.0) in page
    assert "First run: 80 s" in page and "12 s, 3 of 3 rows from the store" in page
    assert "time: 12.5%." in page
    assert "host" not in page  # a machine's name is nobody's business
