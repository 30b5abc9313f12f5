"""Kinds that train, as a recipe runs them: what planning refuses, what it promises, and what comes out."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from compression.checkpoints.checkpoint import Checkpoint, open_checkpoint
from compression.checkpoints.masks import read_masks
from compression.context import Context
from compression.data import DataSpec
from compression.errors import EdgepressError, MissingExtra
from tasks.kinds._training import TrainingStage
from tasks.stage import Inputs, Stage, Workplace, stage_kinds
from tests.tiny import tiny_checkpoint

DATA = DataSpec.model_validate({"text": "embedded", "questions": "embedded", "length": 64, "train_documents": 60, "train_questions": 20})
SHORT = {"steps": 4, "batch_size": 2, "learning_rate": 1e-3}
PARAMETERS: dict[str, dict[str, Any]] = {"prune.rigl": {"sparsity": 0.5, "delta_t": 2}, "prune.lottery": {"sparsity": 0.5, "rounds": 2}}
TRAINING = sorted(uses for uses, kind in stage_kinds().items() if issubclass(kind, TrainingStage))


def stage(uses: str, **parameters: Any) -> Stage:
    return stage_kinds()[uses].model_validate({"uses": uses, **SHORT, **PARAMETERS.get(uses, {}), **parameters})


def plan(uses: str, checkpoint: Path, **parameters: Any) -> Checkpoint:
    made, parent = stage(uses, **parameters), open_checkpoint(checkpoint)
    planned = made.plan(parent, {"teacher": parent}, DATA)
    assert isinstance(planned, Checkpoint)
    return planned


@pytest.mark.slow
@pytest.mark.parametrize("train_on", ["text", "questions"])
@pytest.mark.parametrize("uses", TRAINING)
def test_runs_as_planned_and_is_judged_on_the_validation_split(tmp_path: Path, checkpoint: Path, uses: str, train_on: str) -> None:
    more = {"train_on": train_on, "evaluate_every": 2, "validation_rows": 5}
    place = Workplace(tmp_path / "out", tmp_path / "work")
    points: dict[int, dict[str, float]] = {}
    context = Context(metrics=lambda values, step: points.setdefault(step, {}).update(values))
    metrics = stage(uses, **more).run(Inputs(checkpoint, {"teacher": checkpoint}), place, DATA, context)
    assert {step for step, values in points.items() if "validation_loss" in values} == {2, 4}
    assert metrics["validation_loss"] == points[int(metrics["best_step"])]["validation_loss"]
    assert open_checkpoint(place.out).sparse == plan(uses, checkpoint, **more).sparse == bool(read_masks(place.out))
    assert metrics["batch_size"] == 2


@pytest.mark.parametrize("uses", TRAINING)
def test_settings_that_contradict_each_other_or_the_data(checkpoint: Path, uses: str) -> None:
    parent = open_checkpoint(checkpoint)
    with pytest.raises(ValidationError) as refused:
        stage(uses, patience=2)
    assert refused.value.errors()[0]["loc"] == ("patience",)
    with pytest.raises(EdgepressError) as caught:
        stage(uses, train_on="questions").plan(parent, {"teacher": parent}, DATA.model_copy(update={"questions": None}))
    assert caught.value.key == "train_on"


def test_a_validation_split_that_is_not_there(tmp_path: Path, checkpoint: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text("The lamp is in the mill.\n\n" * 40)
    data = DataSpec.model_validate({"text": {"path": str(tmp_path)}, "length": 16})
    parent = open_checkpoint(checkpoint)
    assert stage("finetune").plan(parent, {}, data)
    with pytest.raises(EdgepressError, match="validation") as caught:
        stage("finetune", evaluate_every=2).plan(parent, {}, data)
    assert caught.value.key == "evaluate_every"


@pytest.mark.parametrize(
    ("uses", "parameters", "key"), [("prune.rigl", {"delta_t": 3}, "delta_t"), ("prune.lottery", {"rewind_step": 4}, "rewind_step")]
)
def test_schedules_that_do_not_fit_the_steps(checkpoint: Path, uses: str, parameters: dict[str, Any], key: str) -> None:
    with pytest.raises(EdgepressError) as caught:
        plan(uses, checkpoint, **parameters)
    assert caught.value.key == key


def test_qlora_without_its_package_is_refused_before_anything_runs(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compression.finetuning.settings.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="bitsandbytes"):
        plan("finetune", checkpoint, method="qlora")


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_adapters_on_tied_ends_are_refused_while_planning(tmp_path: Path, model_type: str) -> None:
    more = {"ffn_dim": 128, "word_embed_proj_dim": 64} if model_type == "opt" else {}
    tied, untied = (tiny_checkpoint(tmp_path / str(tied), model_type, tied=tied, **more) for tied in (True, False))
    for modules in (["embed_tokens"], ["lm_head"], ".*embed_tokens"):
        with pytest.raises(EdgepressError) as caught:
            plan("finetune", tied, target_modules=modules)
        assert caught.value.key == "target_modules"
        assert plan("finetune", untied, target_modules=modules)
        assert plan("finetune", tied, target_modules=modules, method="full")
    assert plan("finetune", tied, target_modules=["q_proj"])


def test_one_process_is_no_distributed_training() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        stage("finetune", distributed={"processes": 1})
