"""A real MLflow server that goes away in the middle of a run, and comes back."""

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.flows.recipes import recipe
from tests.flows.workshop import SAFE, Workshop
from tests.kinds import installed
from tests.waiting import PATIENCE, until

NAMES = ["one", "two", "three"]
STAGES = "".join(f"  {name}: {{uses: test.trivial, number: {number}, seconds: 3, needs: base}}\n" for number, name in enumerate(NAMES))
SECRET = "hunter2"  # a password in the address
CORES = "execution: {cores: 1}\n"  # one stage after the other
pytestmark = pytest.mark.slow


class Server:
    """`mlflow server` on a free port, which can be killed and started again."""

    def __init__(self, folder: Path):
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            sys.executable, "-P", "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}",
            "--artifacts-destination", str(self.folder / "artifacts"), "--port", str(self.port), "--workers", "1",
        ]  # fmt: skip
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment, cwd=self.folder)
        until(self.answers, (self.folder / "server.log").read_text, self.process)

    def answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.uri}/health", timeout=60).status == 200
        except OSError:
            return False

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    made.start()
    yield made
    made.kill()


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, server: Server) -> Workshop:
    made = Workshop(tmp_path_factory.mktemp("away") / "work", checkpoint)
    (made.folder / "micro.yaml").write_text(recipe(checkpoint, STAGES, CORES))
    made.environment |= {
        "MLFLOW_TRACKING_URI": f"http://ada:{SECRET}@127.0.0.1:{server.port}",
        "PYTHONPATH": installed(made.folder / "kinds"),
    }
    return made


def holding(secret: str, *folders: Path) -> list[Path]:
    """Files that contain a secret."""
    return [file for folder in folders for file in folder.rglob("*") if file.is_file() and secret.encode() in file.read_bytes()]


def test_sync_sends_what_an_absent_server_missed(shop: Workshop, server: Server) -> None:
    outbox = shop.folder / ".edgepress" / "outbox"
    process = shop.start()
    try:
        until(shop.computing("test.trivial"), process=process)
        server.kill()
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 0, out + err
    printed = " ".join(out.split())
    assert "does not answer" in printed and "`edgepress sync`" in printed and "Traceback" not in out + err
    assert list(outbox.glob("*.jsonl"))
    assert holding(SECRET, shop.folder, server.folder) == [] and "http://***@127.0.0.1" in printed

    refused = subprocess.run(
        [*SAFE, "sync"], cwd=shop.folder, env=shop.environment, text=True, capture_output=True, timeout=PATIENCE, check=False
    )
    assert refused.returncode == 1 and "still wait" in refused.stderr and "Traceback" not in refused.stderr
    nothing = shop.run()
    assert nothing.code == 2 and "does not answer" in nothing.err and "Traceback" not in nothing.err

    server.start()
    sent = subprocess.run(
        [*SAFE, "sync"], cwd=shop.folder, env=shop.environment, text=True, capture_output=True, timeout=PATIENCE, check=False
    )
    assert sent.returncode == 0 and "MLflow has everything" in sent.stdout, sent.stdout + sent.stderr
    assert not list(outbox.glob("*.jsonl"))
    assert holding(SECRET, shop.folder, server.folder) == [] and SECRET not in "".join(
        (out, err, refused.stdout, refused.stderr, nothing.out, nothing.err, sent.stdout, sent.stderr)
    )
    client = MlflowClient(server.uri)
    (experiment,) = client.search_experiments(filter_string="name = 'edgepress'")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"micro", "base", *NAMES}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    parent = runs["micro"].info.run_id
    for name in NAMES:
        run = runs[name]
        assert run.data.tags["mlflow.parentRunId"] == parent and run.data.tags["edgepress.state"] == "Completed"
        assert len(client.get_metric_history(run.info.run_id, "size_mb")) == 1 and run.data.metrics["seconds"] >= 3
        steps = [point.step for point in client.get_metric_history(parent, f"size_mb/{name}")]
        assert sorted(steps) == [0, 1 + NAMES.index(name)]
    assert {file.path for file in client.list_artifacts(parent)} >= {"recipe", "plan.json", "environment", "run.json", "report.html"}


def test_a_run_sends_what_a_short_absence_delayed(shop: Workshop, server: Server) -> None:
    outbox, back = shop.folder / ".edgepress" / "outbox", shop.folder / "back"
    process = shop.start("stages.two.number=7", "stages.three.number=8", f"stages.three.after={back}")
    try:
        until(shop.computing("test.trivial"), process=process)
        server.kill()
        until(lambda: list(outbox.glob("*.jsonl")), process=process)
        server.start()
        back.touch()  # the run ends when the server is back, however long that took
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 0, out + err
    assert not list(outbox.glob("*.jsonl"))
    client = MlflowClient(server.uri)
    (experiment,) = client.search_experiments(filter_string="name = 'edgepress'")
    runs = list(client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"]))[:5]
    assert {run.info.run_name for run in runs} == {"micro", "base", *NAMES} and {run.info.status for run in runs} == {"FINISHED"}
    one = next(run for run in runs if run.info.run_name == "one")
    first = client.get_run(one.data.tags["edgepress.computed_by"])
    assert first.info.run_name == "one" and first.data.tags["edgepress.state"] == "Completed"
    assert f"/runs/{first.info.run_id})" in one.data.tags["mlflow.note.content"]
