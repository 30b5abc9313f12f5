"""The servers of compose.yaml on PostgreSQL and S3, and the worker of its image: a deployed recipe outlives their restart."""

import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import boto3
import pytest
from mlflow import MlflowClient

from tests.docker.images import instructions
from tests.docker.services import DOCKER, SETTINGS, Stack, postgres_programs
from tests.flows.recipes import recipe
from tests.prefect_api import ask
from tests.waiting import PATIENCE

STAGES = """\
  pruned: {uses: prune.width, keep: 0.5}
  distilled: {uses: distill, steps: 6, batch_size: 2, save_every: 2}
  onnx: {uses: export.onnx}
"""


class Image:
    """What the worker's Dockerfile says of its variables, health and command."""

    def __init__(self) -> None:
        said = instructions(DOCKER / "worker.Dockerfile")
        self.command: list[str] = json.loads(said[-1][1])
        self.check = ["CMD", *json.loads(next(rest for word, rest in said if word == "HEALTHCHECK").partition("CMD ")[2])]
        (variables,) = [rest for word, rest in said if word == "ENV"]
        self.variables = dict(pair.split("=") for pair in variables.split() if not pair.startswith("PATH="))


class Pool:
    """The worker at work in a folder, and the commands that somebody gives beside it."""

    def __init__(self, stack: Stack, environment: Path, folder: Path):
        self.stack, self.folder, image = stack, folder, Image()
        self.volumes = {"/work": folder, "/locks": stack.home / "locks"}
        self.volumes["/locks"].mkdir()
        here = {name: re.sub("^/(work|locks)", lambda found: str(self.volumes[found[0]]), value) for name, value in image.variables.items()}
        variables = here | {
            "PATH": f"{environment / 'bin'}:{os.environ['PATH']}", "PREFECT_WORKER_WEBSERVER_PORT": str(stack.ports["worker"]),
        }  # fmt: skip
        stack.start("worker", image.command, folder, **variables)
        stack.wait_until_healthy("worker", image.check)
        self.variables = stack.environment("worker") | variables

    def call(self, *words: str) -> str:
        done = subprocess.run(words, env=self.variables, cwd=self.folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def api(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return ask(f"{self.variables['PREFECT_API_URL']}/{path}", body)

    def run(self, deployment: str) -> str:
        """Ask for a run; returns its id."""
        (found,) = re.findall(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", self.call("prefect", "deployment", "run", deployment))[:1]
        return str(found)

    def wait_until(self, flow_run: str, *kinds: str, seconds: float = PATIENCE) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while (state := self.api(f"flow_runs/{flow_run}")["state"])["type"] not in kinds:
            assert time.monotonic() < deadline, f"{state}\n{self.stack.log('worker')}"
            time.sleep(0.3)
        return dict(state)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_deployed_recipe_outlives_a_restart_of_its_servers(worker_environment: Path, checkpoint: Path, tmp_path: Path) -> None:
    programs = postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    stack, work = Stack(tmp_path), tmp_path / "work"
    work.mkdir()
    (work / "micro.yaml").write_text(recipe(checkpoint, STAGES))
    with stack.up(programs):
        pool = Pool(stack, worker_environment, work)
        pool.call("edgepress", "deploy", "micro.yaml", "--pool", "edgepress")
        flow_run = pool.run("edgepress/micro")
        tracking = MlflowClient(pool.variables["MLFLOW_TRACKING_URI"])
        _wait_for_a_finished_stage(tracking, stack)
        for server in ("prefect", "mlflow"):
            stack.stop(server)
        assert not (work / "outputs" / "micro" / "onnx").exists()  # it is in the middle
        for server in ("prefect", "mlflow"):
            stack.start(server)
        for server in ("prefect", "mlflow"):
            stack.wait_until_healthy(server)
        state = pool.wait_until(flow_run, "COMPLETED", "FAILED", "CRASHED", "CANCELLED")
        assert state["type"] == "COMPLETED", f"{state}\n{stack.log('worker')}"

        summary = json.loads((work / "outputs" / "micro" / "run.json").read_text())
        rows = {row["stage"]: row for row in summary["rows"]}
        assert list(rows) == ["base", "pruned", "distilled", "onnx"]
        top = tracking.get_run(summary["run"])
        found = tracking.search_runs([top.info.experiment_id], f"tags.`mlflow.parentRunId` = '{summary['run']}'")
        below = {run.data.tags["edgepress.stage"]: run for run in found}  # a run opened while MLflow was away has another name in run.json
        assert below.keys() == rows.keys() and len(found) == len(rows)
        for name, row in rows.items():
            logged = below[name]
            assert logged.info.status == "FINISHED"
            assert logged.data.metrics == pytest.approx(logged.data.metrics | row["metrics"])
        assert top.info.status == "FINISHED"
        tasks = pool.api("task_runs/filter", {"task_runs": {"flow_run_id": {"any_": [flow_run]}}})
        assert {task["name"].split("-")[0]: task["state_type"] for task in tasks} == dict.fromkeys(rows, "COMPLETED")
        assert "report.html" in " ".join(_objects(stack))
        assert (pool.volumes["/locks"] / "edgepress-machine.lock").exists()

        again = pool.wait_until(pool.run("edgepress/micro"), "COMPLETED", "FAILED", "CRASHED")
        assert (again["type"], again["name"]) == ("COMPLETED", "Cached")


def _wait_for_a_finished_stage(tracking: MlflowClient, stack: Stack) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        experiments = [each.experiment_id for each in tracking.search_experiments()]
        if tracking.search_runs(experiments, "tags.`edgepress.stage` = 'pruned' and attributes.status = 'FINISHED'"):
            return
        assert time.monotonic() < deadline, stack.log("worker")
        time.sleep(0.2)


def _objects(stack: Stack) -> list[str]:
    """Names of what is in the bucket."""
    client = boto3.client(
        "s3", endpoint_url=f"http://127.0.0.1:{stack.ports['s3']}", region_name="us-east-1",
        aws_access_key_id=SETTINGS["S3_ACCESS_KEY"], aws_secret_access_key=SETTINGS["S3_SECRET_KEY"],
    )  # fmt: skip
    return [item["Key"] for item in client.list_objects_v2(Bucket="edgepress")["Contents"]]
