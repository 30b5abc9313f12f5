"""MLflow answers and refuses: the run ends as its stages do, and the refused calls are kept with the reason."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.flows.recipes import recipe
from tests.flows.workshop import Workshop
from tests.kinds import installed
from tests.waiting import PATIENCE, until

STAGES = "  one: {{uses: test.trivial, after: {deleted}}}\n  two: {{uses: test.trivial, number: 2, needs: base}}\n"
CORES = "execution: {cores: 1}\n"  # one stage after the other

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Workshop:
    made = Workshop(tmp_path_factory.mktemp("refused") / "work", checkpoint)
    (made.folder / "micro.yaml").write_text(recipe(checkpoint, STAGES.format(deleted=made.folder / "deleted"), CORES))
    made.environment["PYTHONPATH"] = installed(made.folder / "kinds")
    return made


def test_a_run_survives_its_deleted_mlflow_run(shop: Workshop) -> None:
    process = shop.start()
    try:
        until(shop.computing("test.trivial"), process=process)
        parent, _ = shop.latest()
        client = MlflowClient(f"sqlite:///{shop.folder / 'mlflow.db'}")
        client.delete_run(parent.info.run_id)
        (shop.folder / "deleted").touch()
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 0, out + err
    printed = " ".join(out.split())
    assert printed.count("MLflow refuses is kept") == 1 and "refused.jsonl" in printed and "Traceback" not in out + err
    summary = json.loads((shop.folder / "outputs" / "micro" / "run.json").read_text())
    assert {row["stage"]: row["state"] for row in summary["rows"]} == dict.fromkeys(["base", "one", "two"], "Completed")
    assert (shop.folder / ".edgepress" / "runs" / "micro-1.summary.json").exists()
    refused = [json.loads(line) for line in (shop.folder / ".edgepress" / "outbox" / "refused.jsonl").read_text().splitlines()]
    assert {call["arguments"]["run"] for call in refused} == {parent.info.run_id} and all(call["error"] for call in refused)
    assert refused[-1]["call"] == "end" and f"MLflow at sqlite:///mlflow.db refused {len(refused)} calls" in printed
    below = {run.info.run_name: run.info.status for run in shop.runs()}  # the deleted run is not among them
    assert below == dict.fromkeys(["base", "one", "two"], "FINISHED")


def test_a_stage_that_missed_its_gate_counts_as_computed(shop: Workshop) -> None:
    broken = shop.run("gates.two.size_mb={max: 1.0e-9}", "stages.two.number=3")
    assert broken.code == 1 and broken.states()["two"] == "Failed" and broken.rows["two"]["computed"]
    parent, failed = shop.latest()
    assert parent.data.metrics["size_mb/two"] == broken.rows["two"]["metrics"]["size_mb"]  # in the chart too
    assert failed["two"].data.tags["edgepress.content"] == broken.rows["two"]["content"]
    assert [tag.value for data in failed["base"].inputs.dataset_inputs for tag in data.tags] == ["evaluation"]
    passed = shop.run("gates.two.size_mb={max: 1}", "stages.two.number=3")
    assert passed.code == 0 and passed.states()["two"] == "Cached"
    _, cached = shop.latest()
    assert cached["two"].data.tags["edgepress.computed_by"] == failed["two"].info.run_id
    assert [failed["two"].data.tags["edgepress.computed"], "edgepress.computed" in cached["two"].data.tags] == ["true", False]
