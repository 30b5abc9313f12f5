"""Kinds name the metrics that their `run` returns: on these names gates may stand."""

from pathlib import Path
from typing import Any

import pytest

from compression.context import Context
from compression.data import DataSpec
from tasks.runners.jobs import compute_stage
from tasks.stage import stage_kinds

DATA = {"text": "embedded", "length": 32, "train_documents": 40, "calibration_windows": 2}
TRAINING = {"steps": 2, "batch_size": 2, "evaluate_every": 1, "validation_rows": 2}


def run(
    checkpoint: Path, tmp_path: Path, uses: str, parameters: dict[str, Any], data: dict[str, Any] = DATA
) -> tuple[set[str], list[str]]:  # fmt: skip
    said: list[str] = []
    metrics = compute_stage(
        stage={"uses": uses, **parameters}, inputs={"parent": str(checkpoint), "others": {"teacher": str(checkpoint)}},
        place={"out": str(tmp_path / "out"), "work": str(tmp_path / "work")}, data=DataSpec.model_validate(data).model_dump(mode="json"), threads=1, context=Context(seed=1, warn=said.append),
    )  # fmt: skip
    return set(metrics), said


@pytest.mark.parametrize(
    ("uses", "parameters"),
    [
        ("prune.width", {"keep": 0.5}),
        ("prune.depth", {"keep": 0.5}),
        ("prune.unstructured", {"sparsity": 0.5, "method": "wanda"}),
        ("quantize.rtn", {"group_size": 32}),
        ("quantize.gptq", {"group_size": 32}),
        ("quantize.awq", {"group_size": 32}),
        ("quantize.smoothquant", {}),
        ("quantize.fp8", {}),
        ("export.gguf", {"type": "q8_0"}),
        ("distill", {**TRAINING, "gamma": 0.5, "beta": 0.5}),
        ("distill", {**TRAINING, "teacher_cache": "full"}),
        ("finetune", {**TRAINING, "method": "lora"}),
        ("prune.rigl", {**TRAINING, "sparsity": 0.5}),
        ("synthesize", {"documents": 2, "length": 16}),
    ],
)
def test_kind_names_its_metrics(checkpoint: Path, tmp_path: Path, uses: str, parameters: dict[str, Any]) -> None:
    (tmp_path / "work").mkdir()
    metrics, said = run(checkpoint, tmp_path, uses, parameters)
    assert metrics
    assert [warning for warning in said if "does not name" in warning] == []


def test_undeclared_metric_gives_warning(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_kinds()["prune.width"], "metrics", ("kept_*",))
    _, said = run(checkpoint, tmp_path, "prune.width", {"keep": 0.5})
    assert any("PruneWidth.metrics does not name parameters_ratio, intermediate_size, num_attention_heads" in warning for warning in said)


def test_lone_document_gives_warning(checkpoint: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text("The lamp is in the mill.\n" * 100)
    data = DATA | {"text": {"path": str(tmp_path)}}
    _, said = run(checkpoint, tmp_path, "prune.unstructured", {"sparsity": 0.5, "method": "wanda"}, data)
    assert [warning for warning in said if f"{tmp_path / 'train.txt'} has no blank line" in warning]
    _, said = run(checkpoint, tmp_path, "quantize.rtn", {"group_size": 32}, data)
    assert said == []  # reads no text


def test_every_kind_declares_metrics() -> None:
    assert [uses for uses, kind in stage_kinds().items() if kind.__module__.startswith("tasks.kinds") and "*" in kind.metrics] == []
