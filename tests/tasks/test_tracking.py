"""Runs in MLflow that are gone on with: nothing is logged twice."""

import socket
from pathlib import Path

import pytest
from mlflow.entities import Run

from compression.errors import EdgepressError
from tasks.tracking import tracking as tracking_module
from tasks.tracking.tracking import Tracking, whole_address


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('tracking') / 'mlflow.db'}"


def stage_tags(name: str, identity: str) -> dict[str, str]:
    return {"edgepress.kind": "stage", "edgepress.stage": name, "edgepress.identity": identity}


def points(tracking: Tracking, run: str, key: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in tracking.client.get_metric_history(run, key))


def now(tracking: Tracking, run: str) -> Run:
    return tracking.client.get_run(run)


def test_what_a_pipeline_began_is_found_again(uri: str) -> None:
    tracking = Tracking(uri)
    top = tracking.open_run("demo", tags={"edgepress.kind": "pipeline", "edgepress.run": "demo-3"})
    cell = tracking.open_run("bits=2", parent=top, tags={"edgepress.kind": "cell"})
    shared = tracking.open_run("pruned", parent=top, tags=stage_tags("pruned", "1"))
    own = tracking.open_run("rtn", parent=cell, tags=stage_tags("rtn", "2"))
    begun = Tracking(uri).find_open_run(top)
    assert begun is not None and (begun.run, begun.name) == (top, "demo-3") and begun.cells == {"bits=2": cell}
    assert begun.stages == {("pruned", "1"): shared, ("rtn", "2"): own}


def test_a_run_that_is_gone_is_none(uri: str) -> None:
    tracking = Tracking(uri)
    assert tracking.find_open_run("0" * 32) is None
    deleted = tracking.open_run("demo")
    tracking.client.delete_run(deleted)
    assert tracking.find_open_run(deleted) is None


def test_a_reopened_run_gets_only_what_is_new(uri: str, tmp_path: Path) -> None:
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


def test_a_run_that_had_finished_keeps_its_end(uri: str) -> None:
    tracking = Tracking(uri)
    run = tracking.open_run("pruned")
    tracking.client.set_terminated(run, "FINISHED", end_time=12345)
    tracking.reopen(run)
    tracking.end(run, "FINISHED")
    assert (now(tracking, run).info.status, now(tracking, run).info.end_time) == ("FINISHED", 12345)
    tracking.end(run, "FAILED", "too narrow")
    assert now(tracking, run).info.end_time > 12345


def test_a_step_gets_another_value_only_where_that_is_asked(uri: str) -> None:
    tracking = Tracking(uri)
    run = tracking.open_run("micro")
    for again in (False, True, True):
        tracking.log(run, {"perplexity": 3.0 + again}, step=2, again=again)
    assert points(tracking, run, "perplexity") == [(2, 3.0), (2, 4.0)]


def test_a_superseded_stage_is_not_gone_on_with(uri: str) -> None:
    tracking = Tracking(uri)
    top = tracking.open_run("demo", tags={"edgepress.kind": "pipeline"})
    old = tracking.open_run("pruned", parent=top, tags=stage_tags("pruned", "1"))
    new = tracking.open_run("pruned", parent=top, tags=stage_tags("pruned", "2"))
    tracking.supersede(old, by=new)
    begun = tracking.find_open_run(top)
    assert begun is not None and begun.stages == {("pruned", "2"): new}
    assert now(tracking, old).data.tags["edgepress.superseded"] == new


def test_what_came_from_the_store_links_the_run_that_computed_it(uri: str) -> None:
    tracking = Tracking(uri)
    runs = [tracking.open_run("pruned", tags=stage_tags("pruned", "abc")) for _ in range(3)]
    tracking.log(runs[0], {}, tags={"edgepress.computed": "true", "edgepress.state": "Cached"})  # it was gone on with
    tracking.log(runs[1], {}, tags={"edgepress.state": "Cached"})
    tracking.describe(runs[2], "from the store", cached_identity="abc")
    tags = now(tracking, runs[2]).data.tags
    assert tags["edgepress.computed_by"] == runs[0] and tags["mlflow.note.content"].endswith(f"/runs/{runs[0]}).")
    tracking.describe(runs[0], "computed", cached_identity="abc")  # itself
    assert "edgepress.computed_by" not in now(tracking, runs[0]).data.tags


def test_a_curve_is_seen_while_it_is_made_and_is_there_once(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking_module, "_LIVE", 0.0)
    tracking = Tracking(uri)
    run = tracking.open_run("distilled")
    for step in (1, 2, 3):
        tracking.log_live(run, step, {"loss": 1.0 / step})
    assert points(tracking, run, "loss") == [(step, 1.0 / step) for step in (1, 2, 3)]
    tracking.log_curve(run, [(step, {"loss": 1.0 / step, "bad": float("nan")}) for step in (1, 2, 3, 4)])
    assert points(tracking, run, "loss") == [(step, 1.0 / step) for step in (1, 2, 3, 4)] and points(tracking, run, "bad") == []


def test_a_curve_that_broke_off_is_there_to_its_last_point(uri: str) -> None:
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


def test_figures_of_the_machine_go_on_in_a_reopened_run(uri: str) -> None:
    first = Tracking(uri)
    run = first.open_run("distilled")
    started = now(first, run).info.start_time / 1000
    first.log_system(run, {"cpu_percent": 50.0}, started + 5.5)
    second = Tracking(uri)
    second.reopen(run)
    second.log_system(run, {"cpu_percent": 60.0}, started + 65)
    assert points(second, run, "system/cpu_percent") == [(5, 50.0), (65, 60.0)]


def test_an_address_is_whole_again_with_what_the_environment_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ada:hunter2@h:5000")
    assert whole_address("http://***@h:5000") == "http://ada:hunter2@h:5000"
    assert whole_address("http://elsewhere:5000") == "http://elsewhere:5000"
    with pytest.raises(EdgepressError, match="MLFLOW_TRACKING_URI"):
        whole_address("http://***@elsewhere:5000")


def test_all_orphans_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking_module, "_PAGE", 2)
    tracking = Tracking(f"sqlite:///{tmp_path / 'mlflow.db'}")
    living = tracking.open_run("living")
    monkeypatch.setattr(tracking_module, "owner_tag", lambda: f"{socket.gethostname()}/{2**22 + 1}/then")  # no process has this id
    orphans = {tracking.open_run(f"orphan {number}") for number in range(5)}
    assert tracking.end_orphans() == 5
    assert {now(tracking, run).info.status for run in orphans} == {"KILLED"} and now(tracking, living).info.status == "RUNNING"
