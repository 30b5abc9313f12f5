"""The view of MLflow's table of runs that `edgepress ui` opens: kept as MLflow 3.17 keeps what people share, and once."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tasks.measurement.figures import FIGURES
from tasks.tracking import Tracking
from tasks.tracking.runs_view import COLUMNS, KEY, RUN, TAG, runs_address, view_state
from tests.flows.recipes import edgepress


def test_view_has_mlflows_format() -> None:
    envelope = json.loads(view_state())
    assert isinstance(envelope["name"], str) and isinstance(envelope["createdAt"], int) and isinstance(envelope["state"], str)
    state = json.loads(envelope["state"])
    assert state["selectedColumns"][:5] == [f"metrics.`{name}`" for name in COLUMNS]
    assert state["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": RUN}] and state["groupsExpanded"] == {}
    assert {figure.metric for figure in FIGURES} >= set(COLUMNS)
    assert len(view_state()) <= 5000  # characters of a tag of an experiment


def test_changed_view_stays(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracking = Tracking(uri)
    tracking.share_view()
    assert MlflowClient(uri).get_experiment(tracking.experiment).tags[TAG] == view_state()
    MlflowClient(uri).set_experiment_tag(tracking.experiment, TAG, "mine")
    tracking.share_view()
    assert MlflowClient(uri).get_experiment(tracking.experiment).tags[TAG] == "mine"


def test_ui_prints_views_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    class Server:
        def __init__(self, command: list[str], **_: Any):
            started.append(command)

        def wait(self) -> None: ...
        def terminate(self) -> None: ...

    started: list[list[str]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("subprocess.Popen", Server)
    code, out, _ = edgepress(["ui", "--port", "5055"], capfd)
    (experiment,) = MlflowClient("sqlite:///mlflow.db").search_experiments(filter_string="name = 'edgepress'")
    assert code == 0 and len(started) == 1 and started[0][-2:] == ["--port", "5055"]
    assert runs_address("http://127.0.0.1:5055", experiment.experiment_id) in out and f"viewStateShareKey={KEY}" in out
    assert TAG in experiment.tags
