"""A run that is killed, resumed, interrupted and resumed again to its end; then parts of it once more. All by the command line."""

import json
import signal
import sqlite3
import subprocess
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from tasks.store.journal import current_state, read_run, read_runs
from tasks.store.store import Store
from tests.flows.recipes import edgepress, recipe
from tests.flows.workshop import SAFE, Finished, Interrupted, Workshop
from tests.waiting import PATIENCE

pytestmark = pytest.mark.slow

SWEPT = """\
  pruned: {uses: prune.width, keep: 0.5}
  distilled: {uses: distill, steps: 120, batch_size: 2, save_every: 10}
  rtn: {uses: quantize.rtn, group_size: 32}
"""
MATRIX = "matrix: {rtn.bits: [2, 8]}\n"
FIRST, SECOND = "rtn@bits=2", "rtn@bits=8"
STAGE_NAMES = ["pruned", "distilled", FIRST, SECOND]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Workshop:
    made = Workshop(tmp_path_factory.mktemp("resume") / "work", checkpoint)
    (made.folder / "micro.yaml").write_text(recipe(checkpoint, SWEPT, MATRIX))
    return made


def run_command(shop: Workshop, *arguments: str, cwd: Path | None = None) -> Finished:
    done = subprocess.run(
        [*SAFE, *arguments], cwd=cwd or shop.folder, env=shop.environment, text=True, capture_output=True, timeout=PATIENCE, check=False
    )  # fmt: skip
    return Finished(done.returncode, done.stdout, done.stderr, json.loads((shop.folder / "outputs" / "micro" / "run.json").read_text()))


class Resuming(Workshop):
    """The same directory, where what is started is `resume`."""

    def __init__(self, shop: Workshop):
        self.folder, self.environment = shop.folder, shop.environment

    def start(self, *overrides: str, command: list[str] = SAFE) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, "resume"], cwd=self.folder, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip


@pytest.fixture(scope="module")
def killed(shop: Workshop) -> Interrupted:
    """Killed while it trained; then its recipe is changed."""
    ended = shop.interrupt(shop.has_trained, signal.SIGKILL)
    assert psutil.wait_procs(ended.family, timeout=PATIENCE)[1] == []
    (shop.folder / "micro.yaml").write_text("this: is no recipe\n")
    return ended


@pytest.fixture(scope="module")
def stopped(shop: Workshop, killed: Interrupted) -> Interrupted:
    """Resumed, and stopped by Ctrl-C in the sweep."""
    return Resuming(shop).interrupt(shop.computing("quantize.rtn"), signal.SIGINT)


@pytest.fixture(scope="module")
def finished(shop: Workshop, stopped: Interrupted, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Resumed again, from elsewhere, to its end."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    return run_command(shop, "resume", "--store", str(shop.folder / ".edgepress"), cwd=elsewhere)


# each slow fixture has a test of its own, before the tests that need a later one


def test_a_killed_run_is_listed_as_crashed(shop: Workshop, killed: Interrupted, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = edgepress(["runs", "micro-1", "--json", "--store", str(shop.folder / ".edgepress")], capfd)
    run = json.loads(out)
    assert (code, run["state"]) == (0, "Crashed") and "Running" not in {stage["state"] for stage in run["stages"]}


def test_ctrl_c_ends_a_resumed_run(shop: Workshop, stopped: Interrupted) -> None:
    assert stopped.code == 130 and "`edgepress resume`" in stopped.err and "Traceback" not in stopped.err
    assert psutil.wait_procs(stopped.family, timeout=PATIENCE)[1] == []


def test_a_run_is_resumed_to_its_end(shop: Workshop, finished: Finished) -> None:
    assert finished.code == 0, finished.out + finished.err
    assert "resuming micro-2 (interrupted)" in finished.out and "micro.yaml has changed" in finished.out
    assert set(finished.states()) == {"base", *STAGE_NAMES} and set(finished.states().values()) <= {"Completed", "Cached"}
    assert finished.states()["distilled"] == "Cached" and len(shop.contents()) == len(STAGE_NAMES)
    store = Store(shop.folder / ".edgepress")
    runs = read_runs(store)
    assert [(run.run, current_state(store, run), run.resumes) for run in runs] == [
        ("micro-1", "Crashed", None), ("micro-2", "Interrupted", "micro-1"), ("micro-3", "Completed", "micro-2"),
    ]  # fmt: skip
    assert len({(run.text, run.file, run.directory, run.outputs, run.tracking_uri, run.tracking_run) for run in runs}) == 1
    assert {stage.state for stage in runs[2].stages} <= {"Completed", "Cached"}


def test_mlflow_has_one_run_without_repeated_points(shop: Workshop, finished: Finished) -> None:
    runs = shop.runs()
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert sorted(run.info.run_name or "" for run in runs) == sorted(["micro", "base", *STAGE_NAMES, "bits=2", "bits=8"])
    assert not any("edgepress.reason" in run.data.tags for run in runs)
    client = MlflowClient(f"sqlite:///{shop.folder / 'mlflow.db'}")
    for run in runs:
        for metric in run.data.metrics:
            steps = [point.step for point in client.get_metric_history(run.info.run_id, metric)]
            assert len(steps) == len(set(steps)), (run.info.run_name, metric)
    parent = next(run for run in runs if run.info.run_name == "micro")
    assert sorted(point.step for point in client.get_metric_history(parent.info.run_id, "perplexity")) == [0, 1, 2]
    for index, cell in enumerate(("bits=2", "bits=8"), 3):  # whose lineages are on their own runs
        run = next(run for run in runs if run.info.run_name == cell)
        assert sorted(point.step for point in client.get_metric_history(run.info.run_id, "perplexity")) == [0, 1, 2, index]
    assert {file.path for file in client.list_artifacts(parent.info.run_id, "recipe")} == {"recipe/micro.yaml"}


def test_prefect_tags_name_the_resumed_run(shop: Workshop, finished: Finished) -> None:
    with sqlite3.connect(shop.folder / ".edgepress" / "prefect" / "prefect.db") as connection:
        flows = [json.loads(tags) for (tags,) in connection.execute("select tags from flow_run order by created")]
    assert [[tag for tag in tags if tag.startswith("resumes:")] for tags in flows] == [[], ["resumes:micro-1"], ["resumes:micro-2"]]


@pytest.fixture(scope="module")
def parts(shop: Workshop, finished: Finished, checkpoint: Path) -> Finished:
    """One copy of the sweep and what it needs; it and the first stage are computed again."""
    (shop.folder / "micro.yaml").write_text(recipe(checkpoint, SWEPT, MATRIX))
    return run_command(shop, "run", "micro.yaml", "--only", FIRST, "--from", FIRST, "--force", "pruned")


def test_only_from_and_force_recompute_parts(shop: Workshop, finished: Finished, parts: Finished) -> None:
    assert parts.code == 0, parts.out + parts.err
    assert parts.states() == {"base": "Cached", "pruned": "Completed", "distilled": "Cached", FIRST: "Completed"}
    assert [name for name, row in parts.rows.items() if row["computed"]] == ["pruned", FIRST]
    for name, row in parts.rows.items():
        assert (row["content"], row["path"]) == (finished.rows[name]["content"], finished.rows[name]["path"])
    assert "BYTES" not in parts.out and [cell["name"] for cell in parts.summary["sweep"]["cells"]] == ["bits=2"]
    assert not list((shop.folder / ".edgepress" / "damaged").iterdir()) and not list((shop.folder / ".edgepress" / "work").iterdir())
    run = read_run(Store(shop.folder / ".edgepress"), "micro-4")
    assert [stage.name for stage in run.stages] == ["pruned", "distilled", FIRST]
    assert (run.only, run.again) == ((FIRST,), ("pruned", FIRST))
    assert (shop.folder / "outputs" / "micro" / SECOND).is_symlink()  # of the run before


def test_a_forced_stage_gets_a_newer_manifest(shop: Workshop, parts: Finished) -> None:
    store = Store(shop.folder / ".edgepress")
    since = read_run(store, "micro-4").started
    committed = {name: store.manifest(row["identity"])["committed"] > since for name, row in parts.rows.items() if name != "base"}
    assert committed == {"pruned": True, "distilled": False, FIRST: True}
