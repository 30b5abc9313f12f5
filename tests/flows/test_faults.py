"""Faults under a running flow: the flow survives, names the reason, and completes what does not depend on the failed stage."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flows.planning import load_recipe, make_plan
from tasks.runners.machine import machine_lock
from tasks.store.garbage import collect_garbage, verify
from tasks.store.journal import current_state, read_runs
from tasks.store.store import Store
from tests.flows.recipes import recipe
from tests.flows.workshop import Finished, Workshop
from tests.kinds import installed
from tests.waiting import PATIENCE, until

TROUBLES = """\
  pruned: {uses: prune.width, keep: 0.5}
  victim: {uses: prune.width, keep: 0.25, needs: base}
  hung: {uses: test.trouble, what: hang, needs: base, timeout: 8, retries: 0}
  filled: {uses: test.trouble, what: fill, needs: base}
  hungry: {uses: test.trouble, what: hog, needs: base, retries: 0}
  removed: {uses: test.trouble, what: remove, needs: victim}
"""
pytestmark = pytest.mark.slow
MEMORY = Path("/sys/fs/cgroup/memory")
LIMIT = 3 << 30


class Lab(Workshop):
    """A workshop in which the kinds of tests/kinds.py are installed."""

    def __init__(self, folder: Path, checkpoint: Path, stages: str):
        super().__init__(folder, checkpoint)
        (folder / "micro.yaml").write_text(recipe(checkpoint, stages))
        self.environment["PYTHONPATH"] = installed(folder / "site")
        self.store = folder / ".edgepress"


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """A command that runs the rest of its arguments in a cgroup with little memory; none where none can be made."""
    group = MEMORY / f"edgepress-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(LIMIT))
    except OSError:
        yield []
        return
    yield ["/bin/sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    psutil.wait_procs([psutil.Process(int(pid)) for pid in (group / "cgroup.procs").read_text().split()], timeout=PATIENCE)
    group.rmdir()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, cell: list[str]) -> Lab:
    kept = TROUBLES if cell else "".join(line for line in TROUBLES.splitlines(keepends=True) if "hog" not in line)
    return Lab(tmp_path_factory.mktemp("faults") / "lab", checkpoint, kept)


@pytest.fixture(scope="module")
def troubled(lab: Lab, cell: list[str]) -> Finished:
    return lab.run(command=[*cell, sys.executable, "-P", "-m", "flows.cli.main"])


def test_the_flow_survives_failed_stages(lab: Lab, troubled: Finished) -> None:
    assert troubled.code == 1 and "Traceback" not in troubled.out + troubled.err
    states = troubled.states()
    assert states.pop("base") == states.pop("pruned") == states.pop("victim") == "Completed"
    assert set(states.values()) == {"Failed"}
    assert lab.processes() == []


def test_a_hung_stage_ends_with_its_processes(lab: Lab, troubled: Finished) -> None:
    assert "ran past its timeout of 8 s" in troubled.rows["hung"]["reason"] and "ran past its timeout of 8 s" in troubled.out
    pids = lab.store / "work" / troubled.rows["hung"]["identity"] / "work" / "pids"
    ids = pids.read_text().split() if pids.exists() else []  # on a busy machine it may not have started
    assert not any(psutil.pid_exists(int(pid)) for pid in ids)


def test_a_killed_stage_names_exhausted_memory(troubled: Finished, cell: list[str]) -> None:
    if not cell:
        pytest.skip("no cgroup with a limit of memory can be made here")
    assert "killed by the kernel because memory ran out" in troubled.rows["hungry"]["reason"]
    assert "GiB when last seen" in troubled.rows["hungry"]["reason"]


def test_a_full_disk_is_named(troubled: Finished) -> None:
    assert "no space left on the disk" in troubled.rows["filled"]["reason"]


def test_a_removed_entry_is_named(lab: Lab, troubled: Finished) -> None:
    lost = troubled.rows["victim"]["identity"]
    assert f"the result of victim ({lost[:12]}) was removed from the store" in troubled.rows["removed"]["reason"]
    assert troubled.rows["pruned"]["identity"] in Store(lab.store).entries() and lost not in Store(lab.store).entries()
    assert verify(Store(lab.store)).damaged == ()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> tuple[Lab, list[Finished]]:
    """Two flows of one recipe, started together upon one store, each with its own links."""
    folder = tmp_path_factory.mktemp("pair") / "lab"
    slow = f"  slow: {{uses: test.trivial, after: {folder / 'go'}, tally: {folder / 'tally'}}}\n"
    lab = Lab(folder, checkpoint, slow)
    started = {}
    for name in ("one", "two"):
        arguments = [sys.executable, "-P", "-m", "flows.cli.main", "run", "micro.yaml", "--outputs", name]
        with (folder / f"{name}.log").open("w") as log:
            started[name] = subprocess.Popen(arguments, cwd=folder, env=lab.environment, stdout=log, stderr=log)
    until(lambda: any("waits for another run" in (folder / f"{name}.log").read_text() for name in started))
    (folder / "go").touch()
    finished = []
    for name, process in started.items():
        code, out = process.wait(PATIENCE), (folder / f"{name}.log").read_text()
        assert code == 0, out
        finished.append(Finished(0, out, "", json.loads((folder / name / "micro" / "run.json").read_text())))
    return lab, finished


def test_one_of_two_flows_computes(pair: tuple[Lab, list[Finished]]) -> None:
    lab, both = pair
    assert len((lab.folder / "tally").read_text().splitlines()) == 1
    assert sorted(one.states()["slow"] for one in both) == ["Cached", "Completed"]
    assert ["slow: waits for another run, which computes it" in one.out + one.err for one in both].count(True) == 1
    assert len({one.rows["slow"]["content"] for one in both}) == 1
    assert {run.info.status for run in lab.runs()} == {"FINISHED"}
    assert {state for _, state, _ in lab.prefect_states("task_run")} == {"COMPLETED"}
    store = Store(lab.store)
    assert [current_state(store, run) for run in read_runs(store)] == ["Completed", "Completed"]


def test_ctrl_c_ends_a_waiting_run(tmp_path: Path, checkpoint: Path) -> None:
    lab = Lab(tmp_path / "lab", checkpoint, "  pruned: {uses: prune.width, keep: 0.5}\n")
    store = Store(lab.store)
    (_, pruned) = make_plan(load_recipe(lab.folder / "micro.yaml"), store).stages

    def waiting() -> bool:
        return any(stage.state == "Running" for run in read_runs(store) for stage in run.stages)

    with store.lock(pruned.identity):  # as a run does that computes the stage
        interrupted = lab.interrupt(waiting, signal.SIGINT)  # which waits two minutes for its end
    assert interrupted.code == 130 and "Traceback" not in interrupted.out + interrupted.err
    (run,) = read_runs(store)
    assert (run.state, [stage.state for stage in run.stages]) == ("Interrupted", ["Stopped"])
    assert lab.processes() == []


def test_waiting_for_the_machine_is_announced(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPRESS_LOCKS", str(tmp_path))
    lab = Lab(tmp_path / "lab", checkpoint, "  pruned: {uses: prune.width, keep: 0.5}\n")
    with machine_lock(exclusive=True):  # as a run does that times something
        process = lab.start()
        assert process.stdout is not None
        line = next(line for line in process.stdout if "waits" in line)
    out, err = process.communicate(timeout=PATIENCE)
    assert "base: waits for other runs of edgepress on this machine" in line
    assert process.returncode == 0, out + err


# --- a clock that jumps: in the flow, its servers and its children alike ---

CLOCK = """\
import time
from pathlib import Path

_now, _now_ns, _jump = time.time, time.time_ns, Path(__file__).with_name("jump")
time.time = lambda: _now() + float(_jump.read_text())
time.time_ns = lambda: _now_ns() + int(float(_jump.read_text()) * 1e9)
"""
DAY = 86400.0


def set_clock(jump: Path, seconds: float) -> None:
    """At once for all that read it: no process ever sees an empty file."""
    beside = jump.with_name("jump.next")
    beside.write_text(str(seconds))
    beside.replace(jump)


@pytest.fixture(scope="module")
def jumped(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> tuple[Lab, list[Finished]]:
    """Two runs: under the first the clock goes back 33 days, under the second forward 30 days. By the clock the second starts first."""
    folder = tmp_path_factory.mktemp("clock") / "lab"
    stages = f"  one: {{uses: test.trivial, after: {folder / 'go'}}}\n"
    stages += f"  two: {{uses: test.trivial, after: {folder / 'go'}, number: 1, needs: base, timeout: 600}}\n"
    lab = Lab(folder, checkpoint, stages)
    (folder / "site" / "sitecustomize.py").write_text(CLOCK)
    jump = folder / "site" / "jump"
    runs = []
    for before, after, overrides in (
        (30 * DAY, -3 * DAY, ()),
        (0, 30 * DAY, ("stages.two.number=2", f"stages.two.after={folder / 'later'}")),
    ):
        set_clock(jump, before)
        process = lab.start(*overrides)
        until(lab.computing("test.trivial"), process=process)
        set_clock(jump, after)
        (folder / ("later" if overrides else "go")).touch()
        out, err = process.communicate(timeout=PATIENCE)
        runs.append(Finished(process.returncode, out, err, json.loads((folder / "outputs" / "micro" / "run.json").read_text())))
    return lab, runs


def test_a_jumping_clock_stops_nothing(jumped: tuple[Lab, list[Finished]]) -> None:
    lab, runs = jumped
    for run, states in zip(runs, (["Completed", "Completed"], ["Cached", "Completed"]), strict=True):
        assert run.code == 0, run.out + run.err
        assert [run.states()[name] for name in ("one", "two")] == states
    assert {run.info.status for run in lab.runs()} == {"FINISHED"} and lab.processes() == []


def test_order_and_garbage_ignore_the_clock(jumped: tuple[Lab, list[Finished]]) -> None:
    lab, runs = jumped
    store = Store(lab.store)
    journaled = read_runs(store)
    assert [run.run for run in journaled] == ["micro-1", "micro-2"]
    assert journaled[1].started - journaled[0].started < -29 * DAY
    garbage = collect_garbage(store, lab.folder / "outputs", keep_last=1, dry_run=True)
    assert {item.name for item in garbage if item.kind == "run"} == {"micro-1"}
    assert {item.name for item in garbage if item.kind == "entry"} == {runs[0].rows["two"]["identity"]}
