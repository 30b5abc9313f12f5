"""`evaluation:` in a recipe: refused before work where it cannot work, and measured of the base and every stage where it can."""

import json
from pathlib import Path

import pytest
import yaml

from compression.errors import EdgepressError
from flows.planning import load_recipe, make_plan
from tasks.store.store import Store
from tests.flows.recipes import edgepress, recipe

PRUNED = "  pruned: {uses: prune.width, keep: 0.5}\n"


def plan(folder: Path, checkpoint: Path, evaluation: str) -> None:
    file = folder / "recipe.yaml"
    file.write_text(recipe(checkpoint, PRUNED, f"evaluation: {evaluation}\n"))
    make_plan(load_recipe(file), Store(folder / "store"))


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ("{suite: relase}", r"recipe\.yaml:7: evaluation\.suite: Input should be 'release'"),
        ("{sample: 3}", r"recipe\.yaml:7: evaluation\.sample: there is no such key"),
        ("{question_answering: none.jsonl}", r"recipe\.yaml:7: evaluation\.question_answering: there is no file none\.jsonl"),
        ("{new_tokens: 128}", r"recipe\.yaml:7: evaluation\.new_tokens: 128 new tokens leave no room"),
        ("{harness: [none.yaml]}", r"recipe\.yaml:7: evaluation\.harness: there is no task file none\.yaml"),
    ],
)
def test_unusable_settings_are_refused_with_their_line(evaluation: str, message: str, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(EdgepressError, match=message):
        plan(tmp_path, checkpoint, evaluation)


def test_a_missing_package_is_named_with_its_extra(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.extras.find_spec", lambda module: None if module in ("codecarbon", "lm_eval") else True)
    with pytest.raises(EdgepressError, match=r"evaluation\.suite: .*codecarbon; install it with: pip install 'edgepress\[energy\]'"):
        plan(tmp_path, checkpoint, "{suite: release}")
    with pytest.raises(EdgepressError, match=r"evaluation\.harness: .*pip install 'edgepress\[harness\]'"):
        plan(tmp_path, checkpoint, "{harness: [hellaswag]}")
    plan(tmp_path, checkpoint, "{suite: release, energy: counters}")


@pytest.mark.slow
def test_base_and_stage_have_every_measurement(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "probes.jsonl").write_text('{"category": "fraud", "prompt": "Where is the bell?"}\n')
    (tmp_path / "lamp.jsonl").write_text(json.dumps({"q": "The lamp is in the", "choices": ["mill", "barn"], "answer": 0}) + "\n")
    task = {
        "task": "lamp", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "lamp.jsonl"}}, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "choices", "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "lamp.yaml").write_text(yaml.safe_dump(task))
    rest = (
        "evaluation: {samples: 2, new_tokens: 6, question_answering: embedded, limit: 3, red_team: probes.jsonl, harness: [lamp.yaml], energy: 'off'}\n"
        "gates:\n  pruned: {repetition_rate: {max: 1}, harness.lamp.acc: {min: 0}, refusal_rate_delta: {min: -1}}\n"
    )
    (tmp_path / "recipe.yaml").write_text(recipe(checkpoint, PRUNED, rest))
    assert edgepress(["run", "recipe.yaml"], capfd)[0] == 0
    summary = json.loads((tmp_path / "outputs" / "recipe" / "run.json").read_text())
    for row in summary["rows"]:
        assert {"repetition_rate", "empty_rate", "exact_match", "f1", "refusal_rate.fraud", "harness.lamp.acc"} <= row["metrics"].keys()
        assert row["metrics"]["question_answering_count"] == 3
        assert [set(sample) for sample in row["details"]["samples"]] == [{"prompt", "text"}] * 2
        assert row["details"]["harness.lamp"]["count"] == 1
    base, pruned = (row["metrics"] for row in summary["rows"])
    assert pruned["refusal_rate_delta"] == pruned["refusal_rate"] - base["refusal_rate"]
    assert "refusal_rate_delta" not in base
