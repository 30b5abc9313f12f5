"""A recipe from the first run to garbage collection: the command line in a process of its own, on a tiny model, with everything real.

Runs are shared through module fixtures, since each takes many seconds; every test looks at one of them.
"""

import json
import signal
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tasks.store.garbage import collect_garbage, verify
from tasks.store.journal import current_state, read_runs
from tasks.store.store import Store
from tasks.store.summaries import read_summary
from tests.flows.workshop import DECOY, SCRIPT, Finished, Interrupted, Workshop
from tests.waiting import PATIENCE

pytestmark = pytest.mark.slow
STAGES = ["pruned", "distilled", "gptq", "gguf", "onnx"]


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
    """The same recipe with one more gate, which holds."""
    return whole.run("gates.gptq.perplexity={max: 1e9}")


@pytest.fixture(scope="module")
def broken(whole: Workshop, again: Finished) -> Finished:
    """A broken gate, a stage that runs past its timeout, and a changed knob of a third stage."""
    late = "stages.late={uses: prune.width, keep: 0.25, needs: base, timeout: 1.0e-3}"
    return whole.run("gates.gptq.perplexity={max: 1}", late, "stages.onnx.dtype=float16")


def test_the_first_run_computes_everything(whole: Workshop, first: Finished) -> None:
    assert first.code == 0, first.err
    assert first.states() == dict.fromkeys(["base", *STAGES], "Completed")
    assert all(words in first.out for words in ("perplexity", "llama.cpp", "onnxruntime", *STAGES))
    assert " | INFO" not in first.out + first.err and "Traceback" not in first.err


def test_results_are_linked_by_name(whole: Workshop, first: Finished) -> None:
    outputs = whole.folder / "outputs" / "micro"
    for stage in STAGES:
        assert (outputs / stage).resolve() == Path(first.rows[stage]["path"])
    assert (outputs / "pruned" / "model.safetensors").is_file() and list((outputs / "gguf").glob("*.gguf"))
    assert "<svg" in (outputs / "report.html").read_text()
    for export in ("gguf", "onnx"):
        facts = json.loads((outputs / export / "edgepress.json").read_text())
        lineage = ["prune.width", "distill", "quantize.gptq"][: 3 if export == "gguf" else 2]
        assert [step["document"]["uses"] for step in facts["ancestors"]] == lineage
        card = (outputs / export / "README.md").read_text()
        assert "license: unknown" in card and f"uses: {export}" not in card and f"`export.{export}`" in card


def test_user_files_shadow_no_package(whole: Workshop, first: Finished) -> None:
    assert "a file of the user was imported" not in first.out + first.err
    for log in (whole.folder / ".edgepress").rglob("*.log"):
        assert "a file of the user was imported" not in log.read_text()


def test_mlflow_has_a_child_run_each_stage(first: Finished, first_runs: tuple[Run, dict[str, Run]]) -> None:
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


def test_the_parent_run_charts_each_lineage(whole: Workshop, first_runs: tuple[Run, dict[str, Run]]) -> None:
    parent, below = first_runs
    client = MlflowClient(f"sqlite:///{whole.folder / 'mlflow.db'}")
    lineages = {"gguf": ["base", "pruned", "distilled", "gptq", "gguf"], "onnx": ["base", "pruned", "distilled", "onnx"]}
    for leaf, lineage in lineages.items():
        history = sorted((point.step, point.value) for point in client.get_metric_history(parent.info.run_id, f"perplexity/{leaf}"))
        expected = [(["base", *STAGES].index(name), pytest.approx(below[name].data.metrics["perplexity"])) for name in lineage]
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


def test_prefect_has_a_task_run_each_stage(whole: Workshop, first: Finished, broken: Finished) -> None:
    states = [(state, name) for _, state, name in whole.prefect_states("flow_run")]
    assert states == [("COMPLETED", "Completed"), ("COMPLETED", "Cached"), ("FAILED", "Failed")]
    tasks = whole.prefect_states("task_run")
    assert {name for name, _, _ in tasks[:6]} == {"base", *STAGES}
    assert {state for _, _, state in tasks[6:12]} == {"Cached"}


def test_a_second_run_computes_nothing(whole: Workshop, first: Finished, again: Finished) -> None:
    assert again.code == 0, again.err
    assert again.states() == dict.fromkeys(["base", *STAGES], "Cached")
    for name, row in first.rows.items():
        assert row["metrics"] == again.rows[name]["metrics"]
        assert (row["content"], row["path"]) == (again.rows[name]["content"], again.rows[name]["path"])
    assert [gate["outcome"] for gate in again.summary["gates"] if gate["stage"] == "gptq"] == ["PASS"]


def test_failures_stop_only_what_follows(whole: Workshop, first: Finished, broken: Finished) -> None:
    assert broken.code == 1
    assert broken.states() == {
        **dict.fromkeys(["base", "pruned", "distilled"], "Cached"), "gptq": "Failed", "gguf": "Skipped", "onnx": "Completed", "late": "Failed",
    }  # fmt: skip
    assert not broken.rows["gptq"]["computed"]  # another gate recomputes nothing
    assert broken.rows["onnx"]["content"] != first.rows["onnx"]["content"]
    assert "is not at most 1" in broken.rows["gptq"]["reason"] and broken.rows["gguf"]["reason"] == "gptq failed"
    assert "timeout of 0.001 s" in broken.rows["late"]["reason"]
    assert "Traceback" not in broken.out + broken.err
    for words in ("is not at most 1", "timeout of 0.001 s", "skipped"):
        assert words in broken.out
    outputs = whole.folder / "outputs" / "micro"
    assert not (outputs / "late").exists()
    assert {link.name for link in outputs.iterdir() if link.is_symlink()} == {"pruned", "distilled", "onnx"}  # gguf was made of gptq


def test_mlflow_shows_failures_with_reasons(whole: Workshop, broken: Finished) -> None:
    parent, below = whole.latest()
    assert {name: run.info.status for name, run in below.items()} == {
        **dict.fromkeys(["base", "pruned", "distilled", "onnx"], "FINISHED"), "gptq": "FAILED", "late": "FAILED",
    }  # fmt: skip
    assert parent.info.status == "FAILED"
    for reason in ("is not at most 1", "timeout of 0.001 s"):
        assert reason in parent.data.tags["edgepress.reason"]
    assert "is not at most 1" in below["gptq"].data.tags["edgepress.reason"]
    assert "perplexity" in below["gptq"].data.metrics
    assert below["distilled"].data.tags["edgepress.cached"] == "true"


def test_a_cached_stage_links_its_computing_run(whole: Workshop, first_runs: tuple[Run, dict[str, Run]], broken: Finished) -> None:
    computed, (_, cached) = first_runs[1], whole.latest()
    for name in ("base", "pruned", "distilled"):
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


def test_ended_runs_leave_no_processes(whole: Workshop, broken: Finished) -> None:
    assert whole.processes() == []
    assert {run.info.status for run in whole.runs()} == {"FINISHED", "FAILED"}
    assert not list((whole.folder / ".edgepress" / "damaged").iterdir())


def test_the_journal_has_every_run_and_request(whole: Workshop, broken: Finished) -> None:
    store = Store(whole.folder / ".edgepress")
    runs = read_runs(store)
    assert [run.run for run in runs] == ["micro-1", "micro-2", "micro-3"]
    assert [run.state for run in runs] == ["Completed", "Completed", "Failed"]
    assert [run.overrides for run in runs[:2]] == [(), ("gates.gptq.perplexity={max: 1e9}",)]
    for run in runs:
        assert (run.file, run.text) == (str(whole.folder / "micro.yaml"), (whole.folder / "micro.yaml").read_text())
        assert (run.directory, run.outputs) == (str(whole.folder), str(whole.folder / "outputs"))
    assert runs[2].tracking_run == broken.summary["run"] and runs[2].tracking_uri == "sqlite:///mlflow.db"
    assert read_summary(store, "micro-3") == broken.summary and read_summary(store, "micro-1")["journal"] == "micro-1"
    for stage in runs[2].stages:
        row = broken.rows[stage.name]
        assert (stage.state, stage.reason, stage.identity, stage.uses) == (row["state"], row["reason"], row["identity"], row["uses"])
    assert runs[0].identities < set(store.entries()) and [stage.state for stage in runs[1].stages] == ["Cached"] * len(STAGES)


def test_garbage_is_what_one_knob_replaced(whole: Workshop, first: Finished, broken: Finished) -> None:
    store = Store(whole.folder / ".edgepress")
    assert verify(store).damaged == ()
    garbage = collect_garbage(store, whole.folder / "outputs", keep_last=1, dry_run=True)
    found = {kind: {item.name for item in garbage if item.kind == kind} for kind in ("entry", "run", "record", "work", "link")}
    assert found["entry"] == {first.rows["onnx"]["identity"]}
    assert found["run"] == {"micro-1", "micro-2"}
    assert {json.loads((store.root / "records" / f"{key}.json").read_text())["key"]["content"] for key in found["record"]} == {
        first.rows["onnx"]["content"]
    }
    assert found["work"] == set() and found["link"] == set()  # the gate has unpublished those of gptq and gguf


# A second workshop, whose first command is killed.


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("disturbed") / "work", checkpoint)


@pytest.fixture(scope="module")
def killed(disturbed: Workshop) -> Interrupted:
    """Killed while it trained, with a checkpoint already on disk."""
    return disturbed.interrupt(disturbed.has_trained, signal.SIGKILL)


@pytest.fixture(scope="module")
def finished(disturbed: Workshop, killed: Interrupted) -> Finished:
    assert psutil.wait_procs(killed.family, timeout=PATIENCE)[1] == []
    return disturbed.run()


def test_no_process_survives_a_killed_command(killed: Interrupted) -> None:
    assert killed.code == -signal.SIGKILL
    assert len(killed.family) >= 3  # Prefect's server, the fork server, the child that worked
    assert psutil.wait_procs(killed.family, timeout=PATIENCE)[1] == []


def test_the_same_command_finishes_with_equal_bytes(whole: Workshop, again: Finished, disturbed: Workshop, finished: Finished) -> None:
    assert finished.code == 0, finished.err
    states = finished.states()
    assert states["pruned"] == "Cached" and states["distilled"] == "Completed"
    for name in STAGES:
        assert finished.rows[name]["content"] == again.rows[name]["content"], name
    undisturbed = whole.contents()
    assert disturbed.contents() == {identity: undisturbed[identity] for identity in disturbed.contents()}
    assert len(disturbed.contents()) == len(STAGES)
    assert list((disturbed.folder / ".edgepress" / "work").iterdir()) == []


def test_no_run_stays_running(disturbed: Workshop, finished: Finished) -> None:
    statuses = [run.info.status for run in disturbed.runs() if run.data.tags["edgepress.kind"] == "pipeline"]
    assert statuses == ["KILLED", "FINISHED"]
    assert {run.info.status for run in disturbed.runs()} == {"KILLED", "FINISHED"}
    assert all("edgepress.reason" in run.data.tags for run in disturbed.runs() if run.info.status == "KILLED")
    assert [state for _, state, _ in disturbed.prefect_states("flow_run")] == ["CRASHED", "COMPLETED"]
    assert {state for _, state, _ in disturbed.prefect_states("task_run")}.isdisjoint({"RUNNING", "PENDING"})
    store = Store(disturbed.folder / ".edgepress")
    assert [current_state(store, run) for run in read_runs(store)] == ["Crashed", "Completed"]
    assert {stage.state for run in read_runs(store)[1:] for stage in run.stages}.isdisjoint({"Running"})
    assert verify(store).damaged == ()
    assert disturbed.processes() == []
