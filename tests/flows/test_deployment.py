"""Recipes that Prefect runs: deployed to a real server, run by a real process worker, retried as its UI does; and `edgepress serve`.

The directory of the deployment holds files of its owner with the names of our packages. One recipe passes through the fixtures
`crashed`, `retried`, `refused` and `mended`; each test reads one of them.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import psutil
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from compression.errors import EdgepressError
from flows.run import run_recipe
from flows.run.deployment import _earlier_attempt, summary_markdown
from flows.run.prefect_flow import mark_orphans_crashed
from tasks.store.journal import Run, RunBase, current_state, journal, read_run, read_runs, run_names
from tasks.store.store import Store
from tests import waiting
from tests.flows.recipes import edgepress
from tests.flows.workshop import DECOY, SAFE, Workshop
from tests.prefect_api import ask
from tests.waiting import PATIENCE

RECIPE = """\
model: model
data: {text: {path: texts.txt}, length: 32, calibration_windows: 4, evaluation_windows: 4}
device: cpu
threads: 1
stages:
  pruned: {uses: prune.width, keep: 0.5}
  distilled: {uses: distill, steps: 120, batch_size: 2, save_every: 10}
  rtn: {uses: quantize.rtn, group_size: 32}
"""
pytestmark = pytest.mark.slow
PREFECT = [sys.executable, "-P", "-m", "prefect"]


def texts(word: str) -> str:
    return "\n\n".join(f"The {word} number {n} is in the mill, and Dalo owns it since noon." for n in range(300))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def until(moment: Callable[[], Any], what: str, log: Path | None = None) -> Any:
    """Wait for a moment and return what it brought."""
    return waiting.until(moment, lambda: (what, log and log.read_text()))


class Deployed(Workshop):
    """A directory with a recipe, and a Prefect server."""

    def __init__(self, folder: Path, checkpoint: Path, port: int):
        super().__init__(folder, checkpoint)
        shutil.copytree(checkpoint, folder / "model")
        (folder / "micro.yaml").write_text(RECIPE)
        (folder / "texts.txt").write_text(texts("lamp"))
        (folder / "tasks.py").write_text(DECOY)
        for package in ("flows", "compression"):
            (folder / package).mkdir()
            (folder / package / "__init__.py").write_text(DECOY)
        self.api = f"http://127.0.0.1:{port}/api"
        self.environment |= {"PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        self.store = folder / ".edgepress"

    def background(self, *command: str, log: str, **environment: str) -> subprocess.Popen[bytes]:
        with (self.folder.parent / log).open("ab") as output:
            return subprocess.Popen(
                command, cwd=self.folder, env=self.environment | environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip

    def ask(self, path: str, document: dict[str, Any] | None = None) -> Any:
        """GET a path of the API, or POST a document to it, as the UI does."""
        return ask(f"{self.api}/{path}", document)

    def answers(self) -> bool:
        try:
            return bool(self.ask("health"))
        except OSError:
            return False

    def deployment(self, name: str = "micro") -> dict[str, Any]:
        found: dict[str, Any] = self.ask(f"deployments/name/edgepress/{name}")
        return found

    def scheduled(self, name: str = "micro") -> list[dict[str, Any]]:
        """The runs that the server's scheduler has planned."""
        wanted = {"deployments": {"id": {"any_": [self.deployment(name)["id"]]}}, "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
        found: list[dict[str, Any]] = self.ask("flow_runs/filter", wanted)
        return found

    def trigger(self, name: str = "micro") -> str:
        """Run it now; returns the id of the flow run."""
        return str(self.ask(f"deployments/{self.deployment(name)['id']}/create_flow_run", {})["id"])

    def retry(self, flow_run: str) -> None:
        """What the button Retry of Prefect's UI sends."""
        state = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "Retry from the UI"}
        self.ask(f"flow_runs/{flow_run}/set_state", {"state": state, "force": True})

    def ended(self, flow_run: str) -> dict[str, Any]:
        """The flow run, when it has come to an end."""

        def end() -> dict[str, Any] | None:
            found: dict[str, Any] = self.ask(f"flow_runs/{flow_run}")
            return found if found["state"]["type"] in {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"} else None

        found: dict[str, Any] = until(end, "the flow run does not end")
        return found

    def task_states(self, flow_run: str, attempt: int) -> dict[str, str]:
        """Names of the states of the task runs that an attempt began, by stage."""
        wanted = {"flow_runs": {"id": {"any_": [flow_run]}}}
        found = self.ask("task_runs/filter", wanted)
        return {run["name"]: run["state"]["name"] for run in found if run["flow_run_run_count"] == attempt}

    def journal(self, name: str) -> Run:
        return read_run(Store(self.store), name)

    def pipelines(self) -> list[Any]:
        return [run for run in self.runs() if run.data.tags["edgepress.kind"] == "pipeline"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[Deployed]:
    """A Prefect server with a work pool, and a worker that was started in the directory."""
    port = free_port()
    made = Deployed(tmp_path_factory.mktemp("deployment") / "work", checkpoint, port)
    here = {"PREFECT_API_URL": made.api}
    processes = [made.background(*PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port), log="server.log")]
    try:
        until(made.answers, "no server")
        made.ask("work_pools/", {"name": "edge", "type": "process", "base_job_template": {}})
        worker = [*PREFECT, "worker", "start", "--pool", "edge", "--type", "process"]
        processes.append(made.background(*worker, log="worker.log", **here, PREFECT_WORKER_QUERY_SECONDS="1"))
        until(lambda: made.ask("work_pools/edge")["base_job_template"], "no worker")
        made.environment |= here
        yield made
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(timeout=PATIENCE)


@pytest.fixture(scope="module")
def deployed(place: Deployed) -> str:
    """What the command printed that deployed the recipe on a schedule."""
    command = ["deploy", "micro.yaml", "--pool", "edge", "--cron", "0 3 * * 0", "--timezone", "Europe/Berlin", "--set", "seed=3"]
    done = subprocess.run(
        [*SAFE, *command], cwd=place.folder, env=place.environment, text=True, capture_output=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_deployment_has_schedule_parameters_and_directory(place: Deployed, deployed: str) -> None:
    assert "edgepress/micro" in deployed and "prefect worker start --pool edge" in deployed
    found = place.deployment()
    (schedule,) = found["schedules"]
    assert (schedule["schedule"]["cron"], schedule["schedule"]["timezone"], schedule["active"]) == ("0 3 * * 0", "Europe/Berlin", True)
    assert found["parameters"] == {
        "recipe": "micro.yaml", "overrides": ["seed=3"], "only": [], "directory": str(place.folder), "store": ".edgepress", "outputs": "outputs",
    }  # fmt: skip
    assert found["job_variables"] == {"env": {"PYTHONSAFEPATH": "1"}}
    fields = found["parameter_openapi_schema"]["properties"]
    assert fields["overrides"]["type"] == "array" and "stages.distilled.steps=100" in fields["overrides"]["description"]
    assert all(field["description"] for field in fields.values()) and fields["recipe"]["type"] == "string"
    (first, *_) = until(place.scheduled, "nothing was scheduled")
    assert first["auto_scheduled"] and datetime.fromisoformat(first["expected_start_time"]).astimezone(ZoneInfo("Europe/Berlin")).hour == 3


@pytest.fixture(scope="module")
def crashed(place: Deployed, deployed: str) -> dict[str, Any]:
    """A run whose process is killed while it trains."""
    flow_run = place.trigger()
    log = place.folder.parent / "worker.log"
    until(place.has_trained, "no training", log)
    pid = int(place.journal("micro-1").owner.split("/")[1])
    os.kill(pid, signal.SIGKILL)
    until(lambda: log.read_text().count("Check whether the flow run") == 2, "the worker's two parts have not both reported it", log)
    return place.ended(flow_run)


@pytest.fixture(scope="module")
def retried(place: Deployed, crashed: dict[str, Any]) -> dict[str, Any]:
    place.retry(crashed["id"])
    until(lambda: place.ask(f"flow_runs/{crashed['id']}")["run_count"] == 2, "no second attempt")
    return place.ended(crashed["id"])


@pytest.fixture(scope="module")
def refused(place: Deployed, retried: dict[str, Any]) -> dict[str, Any]:
    """A new run: the data are other ones, and something lies where a result is to be linked."""
    (place.folder / "texts.txt").write_text(texts("kettle"))
    link = place.folder / "outputs" / "micro" / "rtn"
    link.unlink()
    (link / "mine").mkdir(parents=True)
    return place.ended(place.trigger())


@pytest.fixture(scope="module")
def mended(place: Deployed, refused: dict[str, Any]) -> dict[str, Any]:
    """That is put away, and the run retried."""
    shutil.rmtree(place.folder / "outputs" / "micro" / "rtn")
    place.retry(refused["id"])
    until(lambda: place.ask(f"flow_runs/{refused['id']}")["run_count"] == 2, "no second attempt")
    return place.ended(refused["id"])


# each slow fixture has a test of its own, before the tests that need a later one


def test_a_killed_run_is_crashed(place: Deployed, crashed: dict[str, Any]) -> None:
    assert (crashed["state"]["type"], crashed["name"]) == ("CRASHED", "micro-1")
    assert {"edgepress", "attempt:1"} <= set(crashed["tags"])
    assert current_state(Store(place.store), place.journal("micro-1")) == "Crashed"


def test_a_retry_keeps_flow_run_and_mlflow_run(place: Deployed, retried: dict[str, Any]) -> None:
    assert (retried["state"]["type"], retried["name"], retried["run_count"]) == ("COMPLETED", "micro-2", 2)
    assert [tag for tag in retried["tags"] if tag.startswith("attempt:")] == ["attempt:2"]
    first, second = place.journal("micro-1"), place.journal("micro-2")
    assert (second.state, second.resumes) == ("Completed", "micro-1") and first.flow_run == second.flow_run == retried["id"]
    assert {stage.name: stage.state for stage in second.stages} == {"pruned": "Cached", "distilled": "Completed", "rtn": "Completed"}
    assert place.task_states(retried["id"], 2) == {"base": "Cached", "pruned": "Cached", "distilled": "Completed", "rtn": "Completed"}
    (run,) = place.pipelines()
    assert run.info.run_id == first.tracking_run == second.tracking_run and run.info.status == "FINISHED"
    assert (place.folder / "outputs" / "micro" / "rtn" / "model.safetensors").is_file() and place.store.is_dir()
    assert {run.info.status for run in place.runs()} == {"FINISHED"}
    (table,) = place.ask("artifacts/filter", {"artifacts": {"key": {"any_": ["edgepress-micro"]}}})
    assert "| distilled |" in table["data"] and str(place.folder / "outputs" / "micro") in table["data"]


def test_an_occupied_link_fails_before_any_work(place: Deployed, retried: dict[str, Any], refused: dict[str, Any]) -> None:
    assert refused["state"]["type"] == "FAILED" and "outputs/micro/rtn" in refused["state"]["message"], refused["state"]
    assert "micro-3" not in run_names(Store(place.store))


def test_changed_data_are_computed_again(place: Deployed, refused: dict[str, Any], mended: dict[str, Any]) -> None:
    assert (mended["id"], mended["state"]["type"]) == (refused["id"], "COMPLETED")
    run = place.journal("micro-3")
    assert (run.state, run.resumes, run.flow_run) == ("Completed", None, refused["id"])
    assert {stage.name: stage.state for stage in run.stages} == {"pruned": "Cached", "distilled": "Completed", "rtn": "Completed"}
    before = {stage.name: stage.identity for stage in place.journal("micro-2").stages}
    assert [stage.name for stage in run.stages if stage.identity != before[stage.name]] == ["distilled", "rtn"]
    assert (place.folder / "outputs" / "micro" / "rtn").is_symlink()


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--pool", "egde"], "there is no work pool 'egde'; did you mean 'edge'?; pools: edge (process)"),
        (["--pool", "edge", "--cron", "0 3 * *"], "Invalid cron string"),
        (["--pool", "edge", "--timezone", "Europe/Berln"], "--timezone Europe/Berln: there is no such time zone"),
        (["--pool", "edge", "--job-variable", "image=x"], "--job-variable image: jobs of the pool edge (process) have no such setting"),
        (["--pool", "edge", "--job-variable", "image"], "write it as key=value"),
        (["--pool", "edge", "--set", "stages.rtn.group_size=7"], "group_size"),
        (["--pool", "edge", "--only", "rtm"], "there is no stage 'rtm'; did you mean 'rtn'?"),
    ],
)
def test_unusable_deployments_are_refused(
    place: Deployed, arguments: list[str], fragment: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place.folder)
    with temporary_settings({PREFECT_API_URL: place.api}):
        code, out, err = edgepress(["deploy", "micro.yaml", "--name", "other", *arguments], capfd)
    assert (code, out) == (2, "") and fragment in " ".join(err.split()) and "Traceback" not in err
    assert [found["name"] for found in place.ask("deployments/filter", {})] == ["micro"]


@pytest.mark.parametrize(("api", "fragment"), [(None, "PREFECT_API_URL names no server"), ("http://127.0.0.1:9/api", "does not answer")])
def test_a_deployment_needs_a_server(
    checkpoint: Path, tmp_path: Path, api: str | None, fragment: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    made = Deployed(tmp_path / "work", checkpoint, 9)
    monkeypatch.chdir(made.folder)
    monkeypatch.setenv("PREFECT_CLIENT_MAX_RETRIES", "0")
    with temporary_settings({PREFECT_API_URL: api}):
        code, out, err = edgepress(["deploy", "micro.yaml", "--pool", "edge"], capfd)
    assert (code, out) == (2, "") and fragment in err


def test_only_the_dead_attempt_is_marked_crashed(place: Deployed, deployed: str) -> None:
    gone = subprocess.run(
        [sys.executable, "-P", "-c", "from tasks.store.owner import owner_tag; print(owner_tag())"],
        text=True,
        capture_output=True,
        check=True,
    )
    flow_runs = []
    for attempt in (1, 0):
        tags = ["edgepress", f"owner:{gone.stdout.strip()}", f"attempt:{attempt}"]
        made = place.ask(f"deployments/{place.deployment()['id']}/create_flow_run", {"state": {"type": "PENDING"}, "tags": tags})
        place.ask(f"flow_runs/{made['id']}/set_state", {"state": {"type": "RUNNING"}})
        flow_runs.append(made["id"])
    with temporary_settings({PREFECT_API_URL: place.api}):
        mark_orphans_crashed()
    found = [place.ask(f"flow_runs/{flow_run}") for flow_run in flow_runs]
    assert [(run["state"]["type"], run["run_count"]) for run in found] == [("CRASHED", 1), ("RUNNING", 1)]
    place.ask(f"flow_runs/{flow_runs[1]}/set_state", {"state": {"type": "COMPLETED"}})


# --- which run a retry resumes ---


def test_a_retry_resumes_its_latest_attempt(tmp_path: Path) -> None:
    store = Store(tmp_path)
    mine, notes = "6f6ba0b7-0d3c-4a3d-9d0a-8f4a5c5b0a11", []  # type: ignore[var-annotated]

    def write(state: Any, **more: Any) -> None:
        run = Run(
            recipe="micro", file="m.yaml", text="", directory=".", outputs="o", base=RunBase(source="x", identity="b", content="b"), stages=(),
            **more,
        )  # fmt: skip
        with journal(store, run) as opened:
            opened.end(state)

    assert _earlier_attempt(store, UUID(mine), notes.append) is None
    write("Failed", flow_run="another")
    assert _earlier_attempt(store, UUID(mine), notes.append) is None
    write("Interrupted", flow_run=mine)
    found = _earlier_attempt(store, UUID(mine), notes.append)
    assert found is not None and found.run == "micro-2" and notes == ["resuming micro-2 (interrupted)"]
    write("Failed", resumes="micro-2")  # by `edgepress resume`
    found = _earlier_attempt(store, UUID(mine), notes.append)
    assert found is not None and found.run == "micro-3"
    alive = found.model_copy(update={"state": "Running", "ended": None, "resumes": "micro-3"})
    with journal(store, alive) as opened:
        with pytest.raises(EdgepressError, match="micro-4, which this would resume, is still running"):
            _earlier_attempt(store, UUID(mine), notes.append)
        opened.end("Completed")
    assert [run.run for run in read_runs(store)][-1] == "micro-4"


def test_the_summary_is_a_table() -> None:
    rows = [
        {"stage": "base", "metrics": {"perplexity": 2.0, "parameters": 2e6}, "state": "Completed", "reason": ""},
        {"stage": "rtn", "metrics": {"perplexity": 2.5}, "state": "Failed", "reason": "2.5 | above\n2.4"},
    ]
    lines = summary_markdown({"name": "micro", "run": "abc", "rows": rows}, Path("/o/micro")).splitlines()
    assert lines[4:] == [
        "| stage | perplexity | params M | state |",
        "| --- | ---: | ---: | --- |",
        "| base | 2.000 | 2.00 | completed |",
        "| rtn | 2.500 |  | failed: 2.5 \\| above 2.4 |",
    ]
    assert run_recipe.name == "edgepress"


# --- serve ---


def test_serve_ends_its_server_and_runs(tmp_path: Path, checkpoint: Path) -> None:
    port = free_port()
    made = Deployed(tmp_path / "work", checkpoint, port)
    command = [*SAFE, "serve", "micro.yaml", "--cron", "0 3 * * 0", "--port", str(port), "--set", "stages.distilled.steps=2000"]
    serving = made.background(*command, log="serve.log", PREFECT_RUNNER_POLL_FREQUENCY="1")
    log = tmp_path / "serve.log"
    try:
        until(lambda: serving.poll() is not None or "deployment: edgepress/micro" in log.read_text(), "no deployment", log)
        until(lambda: made.answers() and made.scheduled(), "nothing was scheduled")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=PATIENCE) as page:
            assert b"<html" in page.read().lower()
        made.trigger()
        until(lambda: serving.poll() is not None or made.has_trained(), "no training", log)
        family = psutil.Process(serving.pid).children(recursive=True)
        serving.send_signal(signal.SIGTERM)
        assert serving.wait(timeout=PATIENCE) == 0, log.read_text()
    finally:
        serving.kill()
    assert psutil.wait_procs(family, timeout=PATIENCE)[1] == [] and "stopped" in log.read_text()
    run = made.journal("micro-1")
    assert run.state == "Interrupted" and run.directory == str(made.folder)
    assert {found.info.status for found in made.runs()} == {"FINISHED", "KILLED"}
    assert [(name, state) for name, state, _ in made.prefect_states("flow_run") if name == "micro-1"] == [("micro-1", "CANCELLED")]


def test_an_occupied_port_is_refused(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    made = Deployed(tmp_path / "work", checkpoint, 1)
    monkeypatch.chdir(made.folder)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        code, _, err = edgepress(["serve", "micro.yaml", "--port", str(listening.getsockname()[1])], capfd)
    assert code == 2 and "Address already in use; take another" in err
