"""A sweep for real: run by the command, with its results, its comparison and its runs in MLflow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.report.comparison import compare
from tests.flows.recipes import recipe
from tests.waiting import PATIENCE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """The folder of a sweep after `edgepress run`."""
    folder = tmp_path_factory.mktemp("sweep")
    stages = "  pruned: {uses: prune.width, keep: 0.5}\n  rtn: {uses: quantize.rtn}\n"
    (folder / "micro.yaml").write_text(recipe(checkpoint, stages, "matrix: {rtn.bits: [2, 8], rtn.group_size: [32]}\n"))
    hidden = ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "EDGEPRESS_STORE", "PYTHONSAFEPATH")
    environment = {k: v for k, v in os.environ.items() if k not in hidden} | {"PREFECT_HOME": str(folder / "home"), "TMPDIR": str(folder)}
    command = [sys.executable, "-P", "-m", "flows.cli.main", "run", "micro.yaml"]
    done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "out.txt").write_text(done.stdout)
    return folder


def test_a_sweep_runs_and_compares_its_cells(finished: Path) -> None:
    links = {file.name for file in (finished / "outputs" / "micro").iterdir() if file.is_symlink()}
    assert links == {"pruned", "rtn@bits=2,group_size=32", "rtn@bits=8,group_size=32"}
    summary = json.loads((finished / "outputs" / "micro" / "run.json").read_text())
    best = {line.values: line.best for line in compare(summary).lines}
    assert "size_mb" in best["2", "32"] and "size_mb" not in best["8", "32"]
    assert "2 cells, the best marked *" in (finished / "out.txt").read_text()
    assert "The sweep" in (finished / "outputs" / "micro" / "report.html").read_text()


def test_each_cell_is_a_run_with_its_stages(finished: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{finished / 'mlflow.db'}")
    runs = {run.info.run_name: run for run in client.search_runs([e.experiment_id for e in client.search_experiments()])}
    assert all(run.info.status == "FINISHED" for run in runs.values())
    top = runs["micro"].info.run_id

    def above(name: str) -> str:
        return runs[name].data.tags["mlflow.parentRunId"]

    assert above("base") == above("pruned") == top
    for bits in ("2", "8"):
        cell, leaf = runs[f"bits={bits},group_size=32"], runs[f"rtn@bits={bits},group_size=32"]
        assert above(cell.info.run_name) == top and above(leaf.info.run_name) == cell.info.run_id
        assert cell.data.params == {"rtn.bits": bits, "rtn.group_size": "32"}
        shared = cell.data.metrics.keys() & leaf.data.metrics.keys()  # a stage without a speed leaves the cell that of the one before
        assert {"perplexity", "accuracy", "size_mb"} <= shared
        assert {name: cell.data.metrics[name] for name in shared} == {name: leaf.data.metrics[name] for name in shared}
