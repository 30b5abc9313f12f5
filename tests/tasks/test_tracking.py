"""Runs in MLflow that are continued: nothing is logged twice."""

import socket
from pathlib import Path

import pytest
from mlflow.entities import Run

from compression.errors import EdgepressError
from tasks.tracking import Tracking, full_address
from tasks.tracking.calls import OWNER
from tasks.tracking.runs import end_orphans


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('tracking') / 'mlflow.db'}"


def stage_tags(name: str, identity: str) -> dict[str, str]:
    return {"edgepress.kind": "stage", "edgepress.stage": name, "edgepress.identity": identity}


def points(tracking: Tracking, run: str, key: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in tracking.client.get_metric_history(run, key))


def now(tracking: Tracking, run: str) -> Run:
    return tracking.client.get_run(run)


def test_open_run_has_cells_and_stages(uri: str) -> None:
    tracking = Tracking(uri)
    top = tracking.open_run("demo", tags={"edgepress.kind": "pipeline", "edgepress.run": "demo-3"})
    cell = tracking.open_run("bits=2", parent=top, tags={"edgepress.kind": "cell"})
    shared = tracking.open_run("pruned", parent=top, tags=stage_tags("pruned", "1"))
    own = tracking.open_run("rtn", parent=cell, tags=stage_tags("rtn", "2"))
    found = Tracking(uri).find_open_run(top)
    assert found is not None and (found.run, found.name) == (top, "demo-3") and found.cells == {"bits=2": cell}
    assert found.stages == {("pruned", "1"): shared, ("rtn", "2"): own}


def test_missing_and_deleted_runs_are_none(uri: str) -> None:
    tracking = Tracking(uri)
    assert tracking.find_open_run("0" * 32) is None
    deleted = tracking.open_run("demo")
    tracking.client.delete_run(deleted)
    assert tracking.find_open_run(deleted) is None


def test_reopened_run_gets_only_new_points(uri: str, tmp_path: Path) -> None:
    before = Tracking(uri)
    run = before.open_run("pruned")
    before.log(run, {"perplexity": 0.1 + 0.2, "size_mb": 1.0}, step=3)
    before.log_curve(run, [(1, {"loss": 2.0}), (2, {"loss": 1.5})])
    before.end(run, "KILLED", "interrupted")

    after = Tracking(uri)
    assert after.open_run("pruned", known=run) == run
    assert now(after, run).info.status == "RUNNING" and "edgepress.reason" not in now(after, run).data.tags
    for _ in range(2):
        after.log(run, {"perplexity": 0.1 + 0.2, "size_mb": 2.0}, step=3)
        after.log_curve(run, [(1, {"loss": 2.0}), (2, {"loss": 1.5}), (3, {"loss": 1.0})])
    assert points(after, run, "perplexity") == [(3, 0.1 + 0.2)]
    assert points(after, run, "size_mb") == [(3, 1.0)]  # a step has one value: the first
    assert points(after, run, "loss") == [(1, 2.0), (2, 1.5), (3, 1.0)]


def test_finished_run_keeps_its_end(uri: str) -> None:
    tracking = Tracking(uri)
    run = tracking.open_run("pruned")
    tracking.client.set_terminated(run, "FINISHED", end_time=12345)
    tracking.reopen(run)
    tracking.end(run, "FINISHED")
    assert (now(tracking, run).info.status, now(tracking, run).info.end_time) == ("FINISHED", 12345)
    tracking.end(run, "FAILED", "too narrow")
    assert now(tracking, run).info.end_time > 12345


def test_step_keeps_first_value_without_again(uri: str) -> None:
    tracking = Tracking(uri)
    run = tracking.open_run("micro")
    for again in (False, True, True):
        tracking.log(run, {"perplexity": 3.0 + again}, step=2, again=again)
    assert points(tracking, run, "perplexity") == [(2, 3.0), (2, 4.0)]


def test_superseded_stage_is_not_continued(uri: str) -> None:
    tracking = Tracking(uri)
    top = tracking.open_run("demo", tags={"edgepress.kind": "pipeline"})
    old = tracking.open_run("pruned", parent=top, tags=stage_tags("pruned", "1"))
    new = tracking.open_run("pruned", parent=top, tags=stage_tags("pruned", "2"))
    tracking.supersede(old, by=new)
    found = tracking.find_open_run(top)
    assert found is not None and found.stages == {("pruned", "2"): new}
    assert now(tracking, old).data.tags["edgepress.superseded"] == new


def test_cached_stage_links_computing_run(uri: str) -> None:
    tracking = Tracking(uri)
    runs = [tracking.open_run("pruned", tags=stage_tags("pruned", "abc")) for _ in range(3)]
    tracking.log(runs[0], {}, tags={"edgepress.computed": "true", "edgepress.state": "Cached"})  # it was resumed
    tracking.log(runs[1], {}, tags={"edgepress.state": "Cached"})
    tracking.describe(runs[2], "from the store", cached_identity="abc")
    tags = now(tracking, runs[2]).data.tags
    assert tags["edgepress.computed_by"] == runs[0] and tags["mlflow.note.content"].endswith(f"/runs/{runs[0]}).")
    tracking.describe(runs[0], "computed", cached_identity="abc")  # itself
    assert "edgepress.computed_by" not in now(tracking, runs[0]).data.tags


def test_live_curve_is_logged_once(uri: str) -> None:
    tracking = Tracking(uri, live_interval=0.0)
    run = tracking.open_run("distilled")
    for step in (1, 2, 3):
        tracking.log_live(run, step, {"loss": 1.0 / step})
    assert points(tracking, run, "loss") == [(step, 1.0 / step) for step in (1, 2, 3)]
    tracking.log_curve(run, [(step, {"loss": 1.0 / step, "bad": float("nan")}) for step in (1, 2, 3, 4)])
    assert points(tracking, run, "loss") == [(step, 1.0 / step) for step in (1, 2, 3, 4)] and points(tracking, run, "bad") == []


def test_failed_stage_keeps_its_curve(uri: str) -> None:
    tracking = Tracking(uri)
    run = tracking.open_run("distilled")
    for step in range(1, 41):
        tracking.log_live(run, step, {"loss": 3.0 / step})
    tracking.log(run, {}, tags={"edgepress.state": "Failed"})
    tracking.end(run, "FAILED", "the loss is nan at step 41")
    assert points(tracking, run, "loss") == [(step, 3.0 / step) for step in range(1, 41)]
    tracking.reopen(run)  # tried again
    for step in range(1, 42):
        tracking.log_live(run, step, {"loss": 3.0 / step})
    tracking.log_curve(run, [(step, {"loss": 3.0 / step}) for step in range(1, 43)])
    tracking.end(run, "FINISHED")
    assert points(tracking, run, "loss") == [(step, 3.0 / step) for step in range(1, 43)]


def test_system_metrics_continue_in_reopened_run(uri: str) -> None:
    first = Tracking(uri)
    run = first.open_run("distilled")
    started = now(first, run).info.start_time / 1000
    first.log_system(run, {"cpu_percent": 50.0}, started + 5.5)
    second = Tracking(uri)
    second.reopen(run)
    second.log_system(run, {"cpu_percent": 60.0}, started + 65)
    assert points(second, run, "system/cpu_percent") == [(5, 50.0), (65, 60.0)]


def test_environment_restores_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ada:hunter2@h:5000")
    assert full_address("http://***@h:5000") == "http://ada:hunter2@h:5000"
    assert full_address("http://elsewhere:5000") == "http://elsewhere:5000"
    with pytest.raises(EdgepressError, match="MLFLOW_TRACKING_URI"):
        full_address("http://***@elsewhere:5000")


def test_all_orphans_are_ended(tmp_path: Path) -> None:
    tracking = Tracking(f"sqlite:///{tmp_path / 'mlflow.db'}")
    living = tracking.open_run("living")
    dead = {OWNER: f"{socket.gethostname()}/{2**22 + 1}/then"}  # no process has this id
    orphans = {tracking.open_run(f"orphan {number}", tags=dead) for number in range(5)}
    assert end_orphans(tracking.client, tracking.experiment, page_size=2) == 5
    assert {now(tracking, run).info.status for run in orphans} == {"KILLED"} and now(tracking, living).info.status == "RUNNING"
