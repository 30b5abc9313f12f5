"""`distill` as a stage: a teacher from outside the recipe, and the teacher cache that stages of a store share."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compression.context import Context
from compression.errors import EdgepressError
from flows.planning import Plan, estimate, load_recipe, make_plan
from tasks.execution import _compute
from tasks.planned_stage import Result
from tasks.runners.jobs import compute_stage
from tasks.store.store import Store
from tests.flows.recipes import recipe
from tests.tiny import tiny_checkpoint

STAGES = """\
  pruned: {{uses: prune.width, keep: 0.5}}
  taught: {{uses: distill, needs: pruned, steps: 2, batch_size: 2, teacher: {teacher}, {more}}}
"""


@pytest.fixture
def large(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "large", hidden=96, layers=3, seed=5)


def plan(home: Path, base: Path, teacher: object, more: str = "alpha: 1") -> Plan:
    (home / "micro.yaml").write_text(recipe(base, STAGES.format(teacher=teacher, more=more)))
    return make_plan(load_recipe(home / "micro.yaml"), Store(home / "store"))


def test_a_teacher_from_elsewhere_is_an_input_by_its_content(tmp_path: Path, checkpoint: Path, large: Path) -> None:
    taught = plan(tmp_path, checkpoint, large).stages[-1]
    assert taught.outside["teacher"].path == large
    assert taught.document["inputs"].keys() == {"parent", "teacher"}
    assert "teacher" not in taught.document["parameters"]
    moved = shutil.copytree(large, tmp_path / "moved")
    assert plan(tmp_path, checkpoint, moved).stages[-1].identity == taught.identity
    tiny_checkpoint(moved, hidden=96, layers=3, seed=6)
    assert plan(tmp_path, checkpoint, moved).stages[-1].identity != taught.identity
    assert plan(tmp_path, checkpoint, "base").stages[-1].identity != taught.identity


def test_its_memory_is_counted(tmp_path: Path, checkpoint: Path, large: Path) -> None:
    inside, outside = plan(tmp_path, checkpoint, "pruned"), plan(tmp_path, checkpoint, large)
    assert estimate(outside.stages[-1], outside).memory > estimate(inside.stages[-1], inside).memory


@pytest.mark.parametrize(
    ("teacher", "more", "key", "message"),
    [
        ("./nowhere", "alpha: 1", "teacher", "no model directory ./nowhere"),
        ("nobody/nothing@main", "alpha: 1", "teacher", "no directory nobody/nothing, and the hub is switched off"),
        ("{large}", "alpha: 1, gamma: 1, feature_layers: {0: 3}", "feature_layers", "block 3 of the teacher, which has blocks 0 to 2"),
        ("{other}", "alpha: 1", "teacher", "do not share a vocabulary: token 300"),
        ("base", "gamma: 1, teacher_cache: full", "teacher_cache", "compares blocks"),
        ("base", "alpha: 1, teacher_cache: top_k, top_k: 320", "top_k", "no tail of a vocabulary of 320"),
    ],
)
def test_what_cannot_teach_is_refused_while_planning(
    tmp_path: Path, checkpoint: Path, large: Path, monkeypatch: pytest.MonkeyPatch, teacher: str, more: str, key: str, message: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    other = shutil.copytree(large, tmp_path / "other")
    document = json.loads((other / "tokenizer.json").read_text())
    names = {index: token for token, index in document["model"]["vocab"].items()}
    document["model"]["vocab"] |= {names[300]: 301, names[301]: 300}
    (other / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(EdgepressError, match=message) as caught:
        plan(tmp_path, checkpoint, teacher.format(large=large, other=other), more)
    assert f"micro.yaml:7: stages.taught.{key}" in str(caught.value)


class Here:
    """Children that work in this process."""

    closed = False

    def run(self, job: Any, home: Path, on_event: Any) -> Any:
        metrics = compute_stage(**job.arguments, threads=job.threads, context=Context(seed=job.seed, device=job.device))
        return SimpleNamespace(metrics=metrics, seconds=0.0)


@pytest.mark.slow
def test_stages_of_a_store_share_what_the_teacher_said(tmp_path: Path, checkpoint: Path, large: Path) -> None:
    """Run as the pipeline runs them, but in this process."""
    results: dict[str, Result] = {"base": Result("base", "base", [], "Completed", path=str(checkpoint))}
    built = []
    for more in ("teacher_cache: full", "teacher_cache: full, temperature: 3.0", "teacher_cache: top_k, top_k: 5"):
        made = plan(tmp_path, checkpoint, large, more)
        store = Store(tmp_path / "store")
        tracking = SimpleNamespace(log_curve=lambda *_: None, log=lambda *_, **__: None)
        pipeline: Any = SimpleNamespace(
            store=store, executor=Here(), machine=made.machine, data=made.parsed.recipe.data, tracking=tracking, results=results,
            progress=lambda *_: None, base=made.base,
        )  # fmt: skip
        results["base"].identity = made.base.identity
        for task in made.stages[1:]:
            assert task.definition is not None
            results[task.name] = Result(task.name, task.definition.uses, [], "Running", identity=task.identity)
            _compute(pipeline, task, task.definition, results[task.name], recompute=False)
        built.append(results["taught"].metrics["teacher_cache_built"])
        assert str(tmp_path) not in str(made.stages[-1].document)  # where the cache is decides nothing
    assert built == [1, 0, 1]
    assert len(list((tmp_path / "store" / "shared" / "teachers").glob("*/checkpoint-1/complete.json"))) == 2
