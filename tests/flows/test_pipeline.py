"""The whole road, as a user walks it: the command line in a process of its own, on a tiny model, with everything real.

Runs are shared through module fixtures, since each takes many seconds; every test looks at one of them.
"""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from compression.checkpoints.checkpoint import file_digests
from tasks.store.garbage import collect_garbage, verify
from tasks.store.journal import current_state, read_runs
from tasks.store.store import Store
from tasks.store.summaries import read_summary
from tests.flows.recipes import recipe
from tests.waiting import PATIENCE, until

SAFE = [sys.executable, "-P", "-m", "flows.cli.main"]
SCRIPT = [str(Path(sys.executable).with_name("edgepress"))]
STAGES = ["pruned", "distilled", "gptq", "gguf", "onnx"]
DECOY = "raise SystemExit('a file of the user was imported')\n"


class Workshop:
    """A directory with a recipe, in which the command is run."""

    def __init__(self, folder: Path, checkpoint: Path):
        self.folder = folder
        folder.mkdir()
        (folder / "micro.yaml").write_text(recipe(checkpoint))
        hidden = ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "EDGEPRESS_STORE", "PYTHONSAFEPATH")
        self.environment = {
            **{key: value for key, value in os.environ.items() if key not in hidden},
            "HF_HUB_OFFLINE": "1", "PREFECT_HOME": str(folder / "prefect-home"), "TMPDIR": str(folder),
        }  # fmt: skip

    def start(self, *overrides: str, command: list[str] = SAFE) -> subprocess.Popen[str]:
        arguments = [*command, "run", "micro.yaml", *(word for override in overrides for word in ("--set", override))]
        return subprocess.Popen(
            arguments, cwd=self.folder, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )  # fmt: skip

    def run(self, *overrides: str, command: list[str] = SAFE) -> "Finished":
        """Run the command to its end."""
        process = self.start(*overrides, command=command)
        out, err = process.communicate(timeout=PATIENCE)
        summary = self.folder / "outputs" / "micro" / "run.json"
        return Finished(process.returncode, out, err, json.loads(summary.read_text()) if summary.exists() else {})

    def interrupt(self, moment: Callable[[], bool], how: signal.Signals) -> "Interrupted":
        """Start the command, send it a signal when the moment has come, and wait for its end."""
        process = self.start()
        try:
            until(moment, process=process)
            family = psutil.Process(process.pid).children(recursive=True)
        except BaseException:
            process.kill()
            raise
        process.send_signal(how)
        out, err = process.communicate(timeout=PATIENCE)
        return Interrupted(process.returncode, out, err, family)

    def computing(self, uses: str) -> Callable[[], bool]:
        """Whether a child works on a stage of this kind now."""

        def moment() -> bool:
            for job in (self.folder / ".edgepress" / "work").glob("*/job.json"):
                with suppress(FileNotFoundError):  # it ended this instant
                    if json.loads(job.read_text())["arguments"].get("stage", {}).get("uses") == uses:
                        return True
            return False

        return moment

    def has_trained(self) -> bool:
        with suppress(FileNotFoundError):  # a stage that ended this instant took its folder along
            return any((self.folder / ".edgepress" / "work").glob("*/work/checkpoint-*"))
        return False

    def contents(self) -> dict[str, dict[str, str]]:
        """Digests of all files in the store's objects, by identity."""
        return {entry.name: file_digests(entry / "content") for entry in (self.folder / ".edgepress" / "objects").iterdir()}

    def runs(self) -> list[Run]:
        """All MLflow runs, the oldest first."""
        client = MlflowClient(f"sqlite:///{self.folder / 'mlflow.db'}")
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        return list(client.search_runs(experiments, order_by=["attributes.start_time ASC"]))

    def latest(self) -> tuple[Run, dict[str, Run]]:
        """The parent run of the last pipeline, and its stages' runs by name."""
        runs = self.runs()
        parent = [run for run in runs if run.data.tags["edgepress.kind"] == "pipeline"][-1]
        below = {run.info.run_name: run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
        return parent, below

    def prefect_states(self, table: str) -> list[tuple[str, str, str]]:
        """(name, type of state, name of state) of all flow runs or task runs, the oldest first."""
        with sqlite3.connect(self.folder / ".edgepress" / "prefect" / "prefect.db") as connection:
            return connection.execute(f"select name, state_type, state_name from {table} order by created").fetchall()

    def processes(self) -> list[psutil.Process]:
        """Processes that still work in this directory."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and self.folder in [Path(process.cwd()), *Path(process.cwd()).parents]:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found


class Finished:
    def __init__(self, code: int, out: str, err: str, summary: dict[str, Any]):
        self.code, self.out, self.err, self.summary = code, out, err, summary

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["stage"]: row for row in self.summary["rows"]}

    def states(self) -> dict[str, str]:
        return {name: row["state"] for name, row in self.rows.items()}


class Interrupted:
    def __init__(self, code: int, out: str, err: str, family: list[psutil.Process]):
        self.code, self.out, self.err, self.family = code, out, err, family


# One undisturbed workshop; its fixtures are requested in this order by the tests below.


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Workshop:
    """A directory whose owner has files with the names of our packages."""
    made = Workshop(tmp_path_factory.mktemp("pipeline") / "whole", checkpoint)
    (made.folder / "tasks.py").write_text(DECOY)
    for package in ("flows", "compression"):
        (made.folder / package).mkdir()
        (made.folder / package / "__init__.py").write_text(DECOY)
    return made


@pytest.fixture(scope="module")
def first(whole: Workshop) -> Finished:
    return whole.run(command=SCRIPT)


@pytest.fixture(scope="module")
def first_runs(whole: Workshop, first: Finished) -> tuple[Run, dict[str, Run]]:
    return whole.latest()


@pytest.fixture(scope="module")
def again(whole: Workshop, first_runs: object) -> Finished:
    """The same recipe with a gate more, which holds."""
    return whole.run("gates.gptq.perplexity={max: 1e9}")


@pytest.fixture(scope="module")
def changed(whole: Workshop, again: Finished) -> Finished:
    return whole.run("stages.gptq.act_order=false")


@pytest.fixture(scope="module")
def broken(whole: Workshop, changed: Finished) -> Finished:
    """A gate that does not hold, and a stage that cannot be done in its time."""
    return whole.run("gates.gptq.perplexity={max: 1}", "stages.late={uses: prune.width, keep: 0.25, needs: base, timeout: 1.0e-3}")


def test_the_first_run_does_everything(whole: Workshop, first: Finished) -> None:
    assert first.code == 0, first.err
    assert first.states() == dict.fromkeys(["base", *STAGES], "Completed")
    assert all(words in first.out for words in ("perplexity", "llama.cpp", "onnxruntime", *STAGES))
    assert " | INFO" not in first.out + first.err and "Traceback" not in first.err


def test_results_are_found_by_name(whole: Workshop, first: Finished) -> None:
    outputs = whole.folder / "outputs" / "micro"
    for stage in STAGES:
        assert (outputs / stage).resolve() == Path(first.rows[stage]["path"])
    assert (outputs / "pruned" / "model.safetensors").is_file() and list((outputs / "gguf").glob("*.gguf"))
    assert "<svg" in (outputs / "report.html").read_text()
    for export in ("gguf", "onnx"):
        facts = json.loads((outputs / export / "edgepress.json").read_text())
        road = ["prune.width", "distill", "quantize.gptq"][: 3 if export == "gguf" else 2]
        assert [step["document"]["uses"] for step in facts["ancestors"]] == road
        card = (outputs / export / "README.md").read_text()
        assert "license: unknown" in card and f"uses: {export}" not in card and f"`export.{export}`" in card


def test_the_files_of_the_user_shadow_nothing(whole: Workshop, first: Finished) -> None:
    assert "a file of the user was imported" not in first.out + first.err
    for log in (whole.folder / ".edgepress").rglob("*.log"):
        assert "a file of the user was imported" not in log.read_text()


def test_mlflow_has_one_run_with_a_child_for_each_stage(first: Finished, first_runs: tuple[Run, dict[str, Run]]) -> None:
    parent, below = first_runs
    assert parent.info.status == "FINISHED" and parent.info.run_id == first.summary["run"]
    assert set(below) == {"base", *STAGES}
    for name, run in below.items():
        assert run.info.status == "FINISHED"
        expected = {"perplexity", "accuracy", "size_mb"} | ({"kl_to_base", "top1_agreement"} if name != "base" else set())
        expected |= {"kl_to_parent"} if name in {"gguf", "onnx"} else {"parameters"}
        expected |= set() if name == "gptq" else {"tokens_per_second", "prefill_tokens_per_second"}
        assert expected <= set(run.data.metrics), name
        assert {key: value for key, value in first.rows[name]["metrics"].items() if key in expected} == pytest.approx(
            {key: value for key, value in run.data.metrics.items() if key in expected}
        )
    assert below["pruned"].data.params["keep"] == "0.5" and below["gptq"].data.params["group_size"] == "32"
    assert below["distilled"].inputs.dataset_inputs and parent.inputs.dataset_inputs
    assert "tokens_per_second" not in below["gptq"].data.metrics  # its layout has no fast kernel here


def test_the_parent_has_each_metric_once_a_stage(whole: Workshop, first_runs: tuple[Run, dict[str, Run]]) -> None:
    parent, below = first_runs
    client = MlflowClient(f"sqlite:///{whole.folder / 'mlflow.db'}")
    roads = {"gguf": ["base", "pruned", "distilled", "gptq", "gguf"], "onnx": ["base", "pruned", "distilled", "onnx"]}
    for leaf, road in roads.items():
        history = sorted((point.step, point.value) for point in client.get_metric_history(parent.info.run_id, f"perplexity/{leaf}"))
        expected = [(["base", *STAGES].index(name), pytest.approx(below[name].data.metrics["perplexity"])) for name in road]
        assert history == expected
    losses = client.get_metric_history(below["distilled"].info.run_id, "loss")
    assert losses and len({point.step for point in losses}) == len(losses)
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {
        "recipe",
        "plan.json",
        "environment",
        "report.html",
        "run.json",
    }
    assert {file.path for file in client.list_artifacts(below["gguf"].info.run_id)} == {"README.md", "edgepress.json"}


def test_prefect_has_a_task_run_for_each_stage(whole: Workshop, first: Finished, broken: Finished) -> None:
    assert [state for _, state, _ in whole.prefect_states("flow_run")] == ["COMPLETED", "COMPLETED", "COMPLETED", "FAILED"]
    tasks = whole.prefect_states("task_run")
    assert {name for name, _, _ in tasks[:6]} == {"base", *STAGES}
    assert {state for _, _, state in tasks[6:12]} == {"Cached"}


def test_the_second_run_takes_everything_from_the_store_whatever_its_gates(whole: Workshop, first: Finished, again: Finished) -> None:
    assert again.code == 0, again.err
    assert again.states() == dict.fromkeys(["base", *STAGES], "Cached")
    for name, row in first.rows.items():
        assert row["metrics"] == again.rows[name]["metrics"]
        assert (row["content"], row["path"]) == (again.rows[name]["content"], again.rows[name]["path"])
    assert [gate["outcome"] for gate in again.summary["gates"] if gate["stage"] == "gptq"] == ["PASS"]


def test_a_changed_knob_runs_that_stage_and_what_depends_on_it(again: Finished, changed: Finished) -> None:
    assert changed.code == 0, changed.err
    assert changed.states() == {**dict.fromkeys(["base", *STAGES], "Cached"), "gptq": "Completed", "gguf": "Completed"}
    assert changed.rows["gptq"]["content"] != again.rows["gptq"]["content"]


def test_a_broken_gate_and_a_failed_stage_stop_only_what_follows(whole: Workshop, broken: Finished) -> None:
    assert broken.code == 1
    assert broken.states() == {
        **dict.fromkeys(["base", "pruned", "distilled", "onnx"], "Cached"), "gptq": "Failed", "gguf": "Skipped", "late": "Failed",
    }  # fmt: skip
    assert not broken.rows["gptq"]["computed"]  # another gate runs nothing again
    assert "is not at most 1" in broken.rows["gptq"]["reason"] and broken.rows["gguf"]["reason"] == "gptq failed"
    assert "timeout of 0.001 s" in broken.rows["late"]["reason"]
    assert "Traceback" not in broken.out + broken.err
    for words in ("is not at most 1", "timeout of 0.001 s", "skipped"):
        assert words in broken.out
    outputs = whole.folder / "outputs" / "micro"
    assert not (outputs / "late").exists()
    assert {link.name for link in outputs.iterdir() if link.is_symlink()} == {"pruned", "distilled", "onnx"}  # gguf was made of gptq


def test_a_failure_is_told_in_mlflow(whole: Workshop, broken: Finished) -> None:
    parent, below = whole.latest()
    assert {name: run.info.status for name, run in below.items()} == {
        **dict.fromkeys(["base", "pruned", "distilled", "onnx"], "FINISHED"), "gptq": "FAILED", "late": "FAILED",
    }  # fmt: skip
    assert parent.info.status == "FAILED"
    for reason in ("is not at most 1", "timeout of 0.001 s"):
        assert reason in parent.data.tags["edgepress.reason"]
    assert "is not at most 1" in below["gptq"].data.tags["edgepress.reason"]
    assert "perplexity" in below["gptq"].data.metrics
    assert below["onnx"].data.tags["edgepress.cached"] == "true"


def test_a_cached_stage_links_the_run_that_computed_it(whole: Workshop, first_runs: tuple[Run, dict[str, Run]], broken: Finished) -> None:
    computed, (_, cached) = first_runs[1], whole.latest()
    for name in ("base", "pruned", "distilled", "onnx"):
        assert cached[name].data.tags["edgepress.computed_by"] == computed[name].info.run_id
        link = f"(#/experiments/{computed[name].info.experiment_id}/runs/{computed[name].info.run_id})"
        assert link in cached[name].data.tags["mlflow.note.content"]
        assert "edgepress.computed_by" not in computed[name].data.tags


def test_runs_are_described_and_tagged(first_runs: tuple[Run, dict[str, Run]]) -> None:
    parent, below = first_runs
    note = below["gguf"].data.tags["mlflow.note.content"]
    assert note.startswith("`export.gguf` after gptq: computed") and "| perplexity |" in note and "**PASS** kl_to_parent" in note
    described = parent.data.tags["mlflow.note.content"]
    assert [line.split(" | ")[0] for line in described.splitlines()[:5]] == [
        "| result",
        "|---|---:|---:|---:|---:|---:|---:|",
        "| base",
        "| gguf",
        "| onnx",
    ]
    assert "| 4 | [gguf](#/experiments/" in described
    assert {run.data.tags["edgepress.run"] for run in (parent, *below.values())} == {"micro-1"}
    tags = below["gptq"].data.tags
    assert [tags[f"edgepress.{tag}"] for tag in ("family", "layout", "bits", "leaf", "makes")] == [
        "llama",
        "gptq",
        "4",
        "false",
        "checkpoint",
    ]
    tags = below["gguf"].data.tags
    assert [tags[f"edgepress.{tag}"] for tag in ("runtime", "leaf", "final", "makes")] == ["llama.cpp", "true", "true", "artifact"]


def test_nothing_is_left_of_runs_that_ended(whole: Workshop, broken: Finished) -> None:
    assert whole.processes() == []
    assert {run.info.status for run in whole.runs()} == {"FINISHED", "FAILED"}
    assert not list((whole.folder / ".edgepress" / "damaged").iterdir())


def test_every_run_is_in_the_journal_with_what_it_was_asked(whole: Workshop, broken: Finished) -> None:
    store = Store(whole.folder / ".edgepress")
    runs = read_runs(store)
    assert [run.run for run in runs] == ["micro-1", "micro-2", "micro-3", "micro-4"]
    assert [run.state for run in runs] == ["Completed", "Completed", "Completed", "Failed"]
    assert [run.overrides for run in runs[:3]] == [(), ("gates.gptq.perplexity={max: 1e9}",), ("stages.gptq.act_order=false",)]
    for run in runs:
        assert (run.file, run.text) == (str(whole.folder / "micro.yaml"), (whole.folder / "micro.yaml").read_text())
        assert (run.directory, run.outputs) == (str(whole.folder), str(whole.folder / "outputs"))
    assert runs[3].tracking_run == broken.summary["run"] and runs[3].tracking_uri == "sqlite:///mlflow.db"
    assert read_summary(store, "micro-4") == broken.summary and read_summary(store, "micro-1")["journal"] == "micro-1"
    for stage in runs[3].stages:
        row = broken.rows[stage.name]
        assert (stage.state, stage.reason, stage.identity, stage.uses) == (row["state"], row["reason"], row["identity"], row["uses"])
    assert runs[0].identities < set(store.entries()) and [stage.state for stage in runs[1].stages] == ["Cached"] * len(STAGES)


def test_the_store_is_whole_and_its_garbage_is_what_one_knob_left(
    whole: Workshop, first: Finished, changed: Finished, broken: Finished
) -> None:
    store = Store(whole.folder / ".edgepress")
    assert verify(store).damaged == ()
    garbage = collect_garbage(store, whole.folder / "outputs", keep_last=1, dry_run=True)
    found = {kind: {item.name for item in garbage if item.kind == kind} for kind in ("entry", "run", "record", "work", "link")}
    assert found["entry"] == {changed.rows[name]["identity"] for name in ("gptq", "gguf")}
    assert found["run"] == {"micro-1", "micro-2", "micro-3"}
    assert {json.loads((store.root / "records" / f"{key}.json").read_text())["key"]["content"] for key in found["record"]} == {
        changed.rows[name]["content"] for name in ("gptq", "gguf")
    }
    assert found["work"] == set() and found["link"] == set()  # those of gptq and gguf were withdrawn by the gate


# A second workshop, disturbed twice.


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("disturbed") / "work", checkpoint)


@pytest.fixture(scope="module")
def killed(disturbed: Workshop) -> Interrupted:
    """Killed while it trained, with a checkpoint already on disk."""
    return disturbed.interrupt(disturbed.has_trained, signal.SIGKILL)


@pytest.fixture(scope="module")
def stopped(disturbed: Workshop, killed: Interrupted) -> Interrupted:
    """Ctrl-C in a later stage, after the killed command went on."""
    assert psutil.wait_procs(killed.family, timeout=PATIENCE)[1] == []
    return disturbed.interrupt(disturbed.computing("export.onnx"), signal.SIGINT)


@pytest.fixture(scope="module")
def finished(disturbed: Workshop, stopped: Interrupted) -> Finished:
    return disturbed.run()


def test_no_process_outlives_a_killed_command(killed: Interrupted) -> None:
    assert killed.code == -signal.SIGKILL
    assert len(killed.family) >= 3  # Prefect's server, the fork server, the child that worked
    assert psutil.wait_procs(killed.family, timeout=PATIENCE)[1] == []


def test_ctrl_c_ends_everything(disturbed: Workshop, stopped: Interrupted) -> None:
    assert stopped.code == 130
    assert "edgepress resume" in stopped.err and "Traceback" not in stopped.err
    assert psutil.wait_procs(stopped.family, timeout=PATIENCE)[1] == []


def test_the_same_command_then_finishes_with_the_same_bytes(
    whole: Workshop, again: Finished, disturbed: Workshop, finished: Finished
) -> None:
    assert finished.code == 0, finished.err
    states = finished.states()
    assert states["pruned"] == states["distilled"] == "Cached" and states["onnx"] == "Completed"
    for name in STAGES:
        assert finished.rows[name]["content"] == again.rows[name]["content"], name
    undisturbed = whole.contents()
    assert disturbed.contents() == {identity: undisturbed[identity] for identity in disturbed.contents()}
    assert len(disturbed.contents()) == len(STAGES)
    assert list((disturbed.folder / ".edgepress" / "work").iterdir()) == []


def test_no_run_stays_running(disturbed: Workshop, finished: Finished) -> None:
    statuses = [run.info.status for run in disturbed.runs() if run.data.tags["edgepress.kind"] == "pipeline"]
    assert statuses == ["KILLED", "KILLED", "FINISHED"]
    assert {run.info.status for run in disturbed.runs()} == {"KILLED", "FINISHED"}
    assert all("edgepress.reason" in run.data.tags for run in disturbed.runs() if run.info.status == "KILLED")
    flows = [state for _, state, _ in disturbed.prefect_states("flow_run")]
    assert flows[0] == "CRASHED" and flows[2] == "COMPLETED" and flows[1] in {"CRASHED", "CANCELLED", "FAILED"}
    assert {state for _, state, _ in disturbed.prefect_states("task_run")}.isdisjoint({"RUNNING", "PENDING"})
    store = Store(disturbed.folder / ".edgepress")
    assert [current_state(store, run) for run in read_runs(store)] == ["Crashed", "Interrupted", "Completed"]
    assert {stage.state for run in read_runs(store)[1:] for stage in run.stages}.isdisjoint({"Running"})
    assert verify(store).damaged == ()
    assert disturbed.processes() == []
