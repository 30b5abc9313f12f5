"""What a pipeline's run in MLflow is made of: series of its chart, plan, environment, registered results."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compression.errors import EdgepressError
from flows.planning import Plan, load_recipe, make_plan, select
from flows.run.mlflow_runs import (
    auxiliary_stages,
    end_cells,
    git_commit,
    installed_requirements,
    known_stages,
    leaves,
    planned_stages,
    series,
)
from flows.run.pipeline import _find_open_run
from flows.run.registering import register_results
from flows.run.summary import summarize
from tasks.measurement.gates import Verdict
from tasks.planned_stage import Result
from tasks.run_context import TrackedRuns
from tasks.store.store import Store
from tasks.tracking import ModelVersion, OpenRun
from tests.flows.recipes import STAGES, recipe

LINEAR = "  pruned: {uses: prune.width, keep: 0.5}\n  gguf: {uses: export.gguf}\n"
GATE = "gates: {gguf: {perplexity: {max: 9}}}\n"


@pytest.fixture
def plan(tmp_path: Path, checkpoint: Path) -> Callable[..., Plan]:
    def made(stages: str = STAGES, rest: str = "") -> Plan:
        file = tmp_path / "micro.yaml"
        file.write_text(recipe(checkpoint, stages, rest))
        return make_plan(load_recipe(file), Store(tmp_path / "store"))

    return made


def test_a_series_is_the_lineage_of_a_leaf(plan: Callable[..., Plan]) -> None:
    assert series(plan(LINEAR)) == {"base": [""], "pruned": [""], "gguf": [""]}
    both = ["/gguf", "/onnx"]
    assert series(plan()) == {"base": both, "pruned": both, "distilled": both, "gptq": ["/gguf"], "gguf": ["/gguf"], "onnx": ["/onnx"]}
    cut = select(plan(), only=["gptq"])
    assert series(cut) == {name: [""] for name in ("base", "pruned", "distilled", "gptq")} and leaves(cut) == ["gptq"]
    swept = plan(rest="matrix: {gptq.bits: [4, 8]}\n")
    assert series(swept).keys() == {"base", "pruned", "distilled"}  # a cell's run has its lineage


TAUGHT = """\
  teacher: {uses: finetune, steps: 2}
  pruned: {uses: prune.width, needs: base, keep: 0.5}
  distilled: {uses: distill, teacher: teacher, steps: 2}
"""


def test_a_teacher_has_a_separate_series(plan: Callable[..., Plan]) -> None:
    made = plan(TAUGHT)
    assert series(made) == {"base": ["", "/teacher"], "pruned": [""], "distilled": [""], "teacher": ["/teacher"]}
    tuned = plan(TAUGHT + "  tuned: {uses: quantize.rtn, group_size: 32, needs: teacher}\n")  # the teacher is in a lineage too
    assert series(tuned) == {
        "base": ["/distilled", "/tuned"], "pruned": ["/distilled"], "distilled": ["/distilled"], "teacher": ["/tuned"], "tuned": ["/tuned"],
    }  # fmt: skip
    swept = plan(TAUGHT, "matrix: {distilled.temperature: [1, 2]}\n")
    assert series(swept) == {"base": ["", "/teacher"], "pruned": [""], "teacher": ["/teacher"]}
    every = plan(TAUGHT, "matrix: {seed: [0, 1]}\n")
    assert series(every) == {"base": [""]} and auxiliary_stages(every) == ["teacher@seed=0", "teacher@seed=1"]


def test_a_cell_charts_leaves_and_auxiliary_stages(plan: Callable[..., Plan]) -> None:
    made = plan(TAUGHT, "matrix: {teacher.steps: [1, 2]}\n")
    curves: dict[str, list[tuple[int, dict[str, float]]]] = {}
    tracking = SimpleNamespace(
        log_curve=lambda run, points, again: curves.update({run: points}), describe=lambda *_: None, end=lambda *_: None
    )
    results = {t.name: Result(t.name, "x", [], "Completed", metrics={"accuracy": t.index / 10}) for t in made.stages}
    cells = {branch.name: branch.name for branch in made.parsed.branches}
    pipeline: Any = SimpleNamespace(name="micro", runs=TrackedRuns("f00", cells=cells), results=results, tracking=tracking)
    end_cells(pipeline, summarize(pipeline, made, 0.0, "micro-1"), made, finished=True)
    index = {task.name: task.index for task in made.stages}
    assert curves.keys() == {"steps=1", "steps=2"}
    for cell, points in curves.items():
        found: dict[str, list[int]] = {}
        for step, metrics in points:
            for metric in metrics:
                found.setdefault(metric, []).append(step)
        assert found == {
            "accuracy": [0, index["pruned"], index[f"distilled@{cell}"]], "accuracy/teacher": [0, index[f"teacher@{cell}"]],
        }  # fmt: skip


def test_resumed_stages_continue_or_supersede_runs(plan: Callable[..., Plan]) -> None:
    made = plan(LINEAR)
    same = made.by_name["pruned"].identity
    begun = OpenRun("top", {}, {("pruned", same): "1", ("gguf", "another"): "2", ("gone", "3"): "3"})
    assert known_stages(made, begun) == ({"pruned": "1"}, {"gguf": "2"})
    assert known_stages(made, None) == ({}, {})


def test_a_lost_mlflow_run_is_warned_of() -> None:
    warnings: list[Any] = []
    tracking = SimpleNamespace(find_open_run=lambda run: None, uri="sqlite:///x.db")
    resumed = SimpleNamespace(run="micro-1", tracking_run="abc")
    assert _find_open_run(tracking, resumed, lambda stage, event: warnings.append((stage, event["warning"]))) is None  # type: ignore[arg-type]
    assert warnings == [("micro-1", "its run abc is not in MLflow at sqlite:///x.db; this one gets a new run there")]


def test_the_plan_is_kept_as_json(plan: Callable[..., Plan], tmp_path: Path) -> None:
    made = plan(LINEAR)
    kept = planned_stages(made, Store(tmp_path / "store"))
    assert [(stage["step"], stage["stage"], stage["in_store"]) for stage in kept] == [
        (0, "base", False),
        (1, "pruned", False),
        (2, "gguf", False),
    ]
    assert kept[1]["identity"] == made.by_name["pruned"].identity and kept[2]["inputs"] == {"parent": "pruned"} and kept[1]["size"] > 0


def test_the_environment_is_recorded(tmp_path: Path) -> None:
    names = [line.partition("==")[0].lower() for line in installed_requirements().splitlines()]
    assert {"mlflow", "torch", "edgepress"} <= set(names) and names == sorted(set(names))
    assert git_commit(tmp_path) == (None, None)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@y"]
    (tmp_path / "a").write_text("1")
    for command in (["init", "-q"], ["add", "a"], ["commit", "-qm", "a"]):
        subprocess.run([*git, *command], check=True)
    commit, changed = git_commit(tmp_path)
    assert commit is not None and len(commit) == 40 and changed is False
    (tmp_path / "a").write_text("2")
    assert git_commit(tmp_path) == (commit, True)


def test_registered_names_differ_when_several(plan: Callable[..., Plan]) -> None:
    def models(made: Plan) -> dict[str, str]:
        return {task.name: task.registered for task in made.stages if task.registered}

    assert models(plan()) == {}
    assert models(plan(rest="registry: {name: tiny}\n")) == {"gguf": "tiny-gguf", "onnx": "tiny-onnx"}
    assert models(plan(rest="registry: {name: tiny, stages: [gptq]}\n")) == {"gptq": "tiny"}
    assert models(plan(rest=GATE + "registry: {name: tiny, stages: [gguf], champion: true}\n")) == {"gguf": "tiny"}


@pytest.mark.parametrize(
    ("rest", "fragment"),
    [
        ("registry: {name: a/b}\n", "registry.name"),
        ("registry: {name: tiny, stages: [ggfu]}\n", "did you mean 'gguf'?"),
        (
            "registry: {name: tiny, champion: true}\n",
            "registry.champion: a champion is a result that passed a gate, and gguf, onnx has none",
        ),
        ("registry: {name: tiny}\nmatrix: {gptq.bits: [4, 8]}\n", "registry: a sweep has many results"),
    ],
)
def test_unusable_registrations_are_refused(plan: Callable[..., Plan], rest: str, fragment: str) -> None:
    with pytest.raises(EdgepressError) as caught:
        plan(rest=rest)
    assert fragment in str(caught.value) and "micro.yaml:" in str(caught.value)


@pytest.mark.parametrize(
    ("outcome", "champion", "aliases"),
    [
        ("PASS", True, ["candidate", "champion"]), ("PASS", False, ["candidate"]), ("INCONCLUSIVE", True, ["candidate"]),
    ],
)  # fmt: skip
def test_a_champion_passed_every_gate_before_it(plan: Callable[..., Plan], outcome: Any, champion: bool, aliases: list[str]) -> None:
    made = plan(rest=GATE + "registry: {name: tiny, stages: [gguf, onnx]}\n")
    results = {
        task.name: Result(task.name, "x", [], "Failed" if task.name == "onnx" else "Completed", runtime="llama.cpp", run=task.name)
        for task in made.stages
    }
    results["pruned"].verdicts = [Verdict("accuracy", outcome, "accuracy fell within noise")]
    results["gguf"].verdicts = [Verdict("perplexity", "PASS", "perplexity 3 is at most 9")]
    calls: list[tuple[str, ModelVersion]] = []
    pipeline: Any = SimpleNamespace(
        name="micro",
        results=results,
        base=made.base,
        tracking=SimpleNamespace(register=lambda *call: calls.append(call) or True),
    )
    (sentence,) = register_results(pipeline, made.stages, champion)
    ((run, version),) = calls
    assert (run, version.name, version.aliases, version.extra) == ("gguf", "tiny-gguf", aliases, "llamacpp")
    assert ("not champion: accuracy fell within noise" in sentence) == (outcome == "INCONCLUSIVE")


@pytest.mark.parametrize(
    ("gate", "verdicts", "unjudged"),
    [
        ("tokens_per_second: {min: 100000, if_measured: true}", [], "tokens_per_second at least 100000 (if measured)"),
        (
            "perplexity: {max: 9}, tokens_per_second: {max_decrease: 0, if_measured: true}", ["perplexity"],
            "tokens_per_second at most 0% below base (if measured)",
        ),
        (
            "perplexity: {max: 9, max_increase: 1, if_measured: true}", ["perplexity"],
            "perplexity at most 9 and at most 100% above base (if measured)",
        ),
        ("perplexity: {max: 9, max_increase: 1}", ["perplexity", "perplexity"], ""),
    ],
)  # fmt: skip
def test_an_unjudged_gate_prevents_a_champion(plan: Callable[..., Plan], gate: str, verdicts: list[str], unjudged: str) -> None:
    stages = "  q: {uses: quantize.rtn, group_size: 32}\n"
    made = plan(stages, f"gates: {{q: {{{gate}}}}}\nregistry: {{name: tiny, stages: [q], champion: true}}\n")
    results = {task.name: Result(task.name, "x", [], "Completed", runtime="transformers", run=task.name) for task in made.stages}
    results["q"].verdicts = [Verdict(metric, "PASS", "kept") for metric in verdicts]
    given: list[list[str]] = []
    pipeline: Any = SimpleNamespace(
        name="micro",
        results=results,
        base=made.base,
        tracking=SimpleNamespace(register=lambda _, version: given.append(version.aliases) or True),
    )
    (sentence,) = register_results(pipeline, made.stages, champion=True)
    assert given == [["candidate"] if unjudged else ["candidate", "champion"]]
    assert sentence.endswith(f"not champion: its gate was not judged: {unjudged}" if unjudged else "of tiny")
