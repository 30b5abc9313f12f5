"""The summary of a run: every planned stage has a row, however it ended."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compression.data import fingerprint
from flows.planning import Plan, load_recipe, make_plan, select
from flows.run.summary import summarize
from tasks.planned_stage import Result
from tasks.run_context import TrackedRuns
from tasks.store.store import Store
from tests.flows.recipes import recipe

STAGES = "  a: {uses: prune.width, keep: 0.5}\n  b: {uses: quantize.rtn, group_size: 32}\n  c: {uses: export.gguf, type: f16, needs: a}\n"


@pytest.fixture
def plan(tmp_path: Path, checkpoint: Path) -> Plan:
    (tmp_path / "r.yaml").write_text(recipe(checkpoint, STAGES))
    return make_plan(load_recipe(tmp_path / "r.yaml"), Store(tmp_path / "store"))


def rows(plan: Plan, *results: Result) -> dict[str, dict[str, Any]]:
    pipeline: Any = SimpleNamespace(name="r", runs=TrackedRuns("f00"), results={result.name: result for result in results})
    made = summarize(pipeline, plan, 0.0, "r-1")
    assert json.loads(json.dumps(made)) and [row["stage"] for row in made["rows"]] == ["base", "a", "b", "c"]
    return {row["stage"]: row for row in made["rows"]}


def result(name: str, state: str, **more: Any) -> Result:
    return Result(name, "kind", [], state, **more)


def test_stages_that_never_began_say_why(plan: Plan) -> None:
    failed = rows(plan, result("base", "Cached"), result("a", "Failed", reason="boom"))
    assert [(failed[name]["state"], failed[name]["reason"]) for name in "abc"] == [
        ("Failed", "boom"), ("Skipped", "a failed"), ("Skipped", "a failed"),
    ]  # fmt: skip
    stopped = rows(plan, result("base", "Cached"), result("a", "Stopped"))
    assert [(stopped[name]["state"], stopped[name]["reason"]) for name in "bc"] == [("Skipped", "the run was interrupted")] * 2


def test_the_summary_records_measurement_digests(plan: Plan) -> None:
    pipeline: Any = SimpleNamespace(name="r", runs=TrackedRuns("f00"), results={})
    environment = json.loads(json.dumps(summarize(pipeline, plan, 0.0, "r-1")))["environment"]
    assert environment["measured_with"] == plan.measured_with and plan.measured_with["quality"]
    assert environment["data"] == fingerprint(plan.parsed.recipe.data)


def test_layer_figures_come_from_layers_json(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "layers.json").write_text('{"model.layers.0.mlp.up_proj": {"relative_error": 0.25}}')
    found = rows(
        plan, result("base", "Cached"), result("a", "Completed", path=str(tmp_path)), result("b", "Completed", path=str(tmp_path / "store"))
    )
    assert found["a"]["layers"] == {"model.layers.0.mlp.up_proj": {"relative_error": 0.25}} and found["b"]["layers"] == {}


def test_a_partial_sweep_counts_excluded_results(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "r.yaml").write_text(recipe(checkpoint, STAGES, "matrix: {b.bits: [2, 4, 8]}\n"))
    whole = make_plan(load_recipe(tmp_path / "r.yaml"), Store(tmp_path / "store"))
    runs = TrackedRuns("f00", cells={branch.name: "" for branch in whole.parsed.branches})
    pipeline: Any = SimpleNamespace(name="r", runs=runs, results={})
    for only, left_out in ([], 0), (["b@bits=4"], 2), (["b"], 0):
        made = summarize(pipeline, select(whole, only=only), 0.0, "r-1")["sweep"]
        assert (len(made["cells"]), made["left_out"]) == (3 - left_out, left_out)
