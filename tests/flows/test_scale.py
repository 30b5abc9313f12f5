"""A sweep on remote runners: two workers share it through one store, one of them is killed, and the results equal those of a local run."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tasks.store.store import Store
from tests.flows.recipes import recipe
from tests.tasks.cluster import Cluster, DaskCluster, PrefectPool

STAGES = "  distilled: {uses: distill, steps: 120, batch_size: 2, save_every: 5}\n  rtn: {uses: quantize.rtn, group_size: 32}\n"
PATIENCE = 500  # seconds
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * PATIENCE)]
SWEEP = "matrix: {distilled.temperature: [1, 4]}\nevaluation: {samples: 0}\n"  # a job of a pool takes a process with torch in it


class Sweep:
    """A recipe of one sweep in a folder, and its runs there."""

    def __init__(self, folder: Path, checkpoint: Path):
        self.folder = folder
        (folder / "sweep.yaml").write_text(recipe(checkpoint, STAGES, SWEEP))

    def start(self, store: str, *settings: str, **environment: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-P", "-m", "flows.cli.main", "run", "sweep.yaml", "--store", store, "--outputs", f"{store}-out"]
        return subprocess.Popen(
            [*command, *(word for setting in settings for word in ("--set", setting))], cwd=self.folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": str(self.folder), **environment},
        )  # fmt: skip

    def contents(self, store: str) -> dict[str, str]:
        """Digests of the bytes by identity."""
        opened = Store(self.folder / store)
        return {identity: opened.manifest(identity)["content"] for identity in opened.entries()}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Sweep:
    """The sweep, after a local run into the store `here`."""
    made = Sweep(tmp_path_factory.mktemp("sweep"), checkpoint)
    with made.start("here") as process:
        try:
            out, _ = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode == 0, out
    return made


def killing_one_worker(cluster: Cluster, store: Path, process: "subprocess.Popen[str]") -> str:
    """Kill the worker of the first distillation that has a checkpoint; return what the run printed."""
    output: list[str] = []
    reader = threading.Thread(target=lambda: output.extend(process.stdout or ()))
    reader.start()
    try:
        cluster.kill_worker_of(_training_child(store, process, output))
        assert process.wait(PATIENCE) == 0, "".join(output) + cluster.log.read_text()
    finally:
        process.kill()
        reader.join()
    return "".join(output)


def _training_child(store: Path, process: "subprocess.Popen[str]", output: list[str]) -> int:
    """The process id of a child that trains and has a checkpoint. It is stopped, so that it cannot end before it is killed."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert process.poll() is None, "".join(output)
        for events in store.glob("work/[0-9a-f]*/events.jsonl"):  # not those of measurements
            try:
                lines = [json.loads(line) for line in events.read_text().splitlines(keepends=True) if line.endswith("\n")]
                if any(event.get("progress", [0])[0] > 5 for event in lines):
                    child = int(lines[0]["started"].rpartition("/")[2])
                    os.kill(child, signal.SIGSTOP)
                    if not (events.parent / "result.json").exists():
                        return child
                    os.kill(child, signal.SIGCONT)
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended already; another one follows
        time.sleep(0.01)
    raise AssertionError("no stage trains")


def test_dask_workers_share_a_sweep_despite_a_kill(sweep: Sweep, tmp_path: Path) -> None:
    with DaskCluster(tmp_path, workers=2) as cluster:
        process = sweep.start("dask", "execution.runner=dask", f"execution.address={cluster.address}")
        output = killing_one_worker(cluster, sweep.folder / "dask", process)
    assert "its worker was lost; restarted on" in output
    assert sweep.contents("dask") == sweep.contents("here")


def test_prefect_workers_share_a_sweep_despite_a_kill(sweep: Sweep, tmp_path: Path) -> None:
    with PrefectPool(tmp_path, workers=2) as cluster:
        process = sweep.start("prefect", "execution.runner=prefect", "execution.pool=edge", PREFECT_API_URL=cluster.address)
        output = killing_one_worker(cluster, sweep.folder / "prefect", process)
    assert "its worker was lost; restarted on" in output
    assert sweep.contents("prefect") == sweep.contents("here")
