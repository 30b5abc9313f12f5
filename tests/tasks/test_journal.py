import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compression.errors import EdgepressError
from tasks.store.journal import StageStatus, current_state, journal, read_run, read_runs, run_names
from tasks.store.store import Store
from tests.tasks.entries import a_run


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_journal_follows_run(store: Store) -> None:
    with journal(store, a_run("demo", ["1", "2"], overrides=("seed=1",))) as opened:
        assert opened.run.run == "demo-1" and opened.run.sequence == 1
        begun = read_run(store, "demo-1")
        assert begun == opened.run and current_state(store, begun) == "Running"
        assert [stage.state for stage in begun.stages] == ["Pending", "Pending"] and begun.overrides == ("seed=1",)
        opened.update(tracking_run="abc")
        opened.update_stages(
            {"base": StageStatus("Cached"), "s0": StageStatus("Completed", seconds=2.5), "s1": StageStatus("Failed", "too narrow")}
        )
        opened.end("Failed")
    ended = read_run(store, "demo-1")
    assert (ended.state, ended.tracking_run) == ("Failed", "abc") and ended.ended is not None
    assert [(s.state, s.reason, s.seconds) for s in ended.stages] == [("Completed", "", 2.5), ("Failed", "too narrow", 0.0)]


def test_run_order_ignores_clock(store: Store) -> None:
    for recipe, clock in [("demo", 3e9), ("other", 2e9), ("demo", -5.0)]:
        with journal(store, a_run(recipe, [], started=clock)) as opened:
            opened.end("Completed")
    assert run_names(store) == ["demo-1", "other-2", "demo-3"]
    assert [run.started for run in read_runs(store)] == [3e9, 2e9, -5.0]


@pytest.mark.parametrize(("error", "state", "reason"), [(KeyboardInterrupt(), "Interrupted", ""), (OSError("disk"), "Failed", "disk")])
def test_interrupted_run_stops_its_stages(store: Store, error: BaseException, state: str, reason: str) -> None:
    with pytest.raises(type(error)), journal(store, a_run("demo", ["1"])) as opened:
        opened.update_stages({"s0": StageStatus("Running")})
        raise error
    run = read_run(store, "demo-1")
    assert (run.state, run.reason, run.stages[0].state) == (state, reason, "Stopped")


def test_run_without_status_fails(store: Store) -> None:
    with pytest.raises(RuntimeError, match="demo-1"), journal(store, a_run("demo", [])):
        pass


def test_killed_run_is_crashed(store: Store) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom tasks.store.journal import journal\nfrom tasks.store.store import Store\nfrom tests.tasks.entries import a_run\n"
        "with journal(Store(Path(sys.argv[1])), a_run('demo', ['1'])):\n    print('begun', flush=True); sys.stdin.read()"
    )
    ours = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", code, store.root], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ours)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    assert current_state(store, read_run(store, "demo-1")) == "Running"
    process.kill()
    process.wait()
    run = read_run(store, "demo-1")
    assert run.state == "Running" and current_state(store, run) == "Crashed"


def test_newer_journal_is_read(store: Store) -> None:
    with journal(store, a_run("demo", [])) as opened:
        opened.end("Completed")
    file = store.root / "runs" / "demo-1.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "news": 1}))
    assert read_run(store, "demo-1") == opened.run
    file.write_text(json.dumps({**document, "stages": 1}))
    with pytest.raises(EdgepressError, match=r"demo-1\.json .*store verify"):
        read_run(store, "demo-1")
    with pytest.raises(EdgepressError, match="no run 'demo-2'.*runs: demo-1"):
        read_run(store, "demo-2")
