"""What `evaluation:` turns on: when each measurement applies, what decides its key, and that its job gives the metrics it announces."""

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml

from compression.checkpoints.checkpoint import open_checkpoint
from compression.context import Context
from compression.data import DataSpec
from compression.evaluation.findings import Findings
from compression.evaluation.spec import EvaluationSpec
from tasks.measurement.measurement import Measurement, MeasurementRequest, ReferenceModel, Subject, measurements
from tasks.store.identity import Machine

OPTIONAL = {"samples", "question_answering", "summarization", "red_team", "harness", "latency", "energy"}
DATA = DataSpec.model_validate(
    {"text": "embedded", "questions": "embedded", "length": 32, "evaluation_windows": 4, "evaluation_questions": 2}
)


def asked(checkpoint: Path, **settings: Any) -> MeasurementRequest:
    return MeasurementRequest(open_checkpoint(checkpoint), ("base",), DATA, EvaluationSpec.model_validate(settings))


def subject(checkpoint: Path, **settings: Any) -> Subject:
    return Subject(asked(checkpoint, **settings), ReferenceModel(checkpoint, "0" * 64), {}, checkpoint, Machine("cpu", 1))


def applying(of: MeasurementRequest) -> set[str]:
    return {m.name for m in measurements() if m.applies(of)} & OPTIONAL


def by_name(name: str) -> Measurement:
    return next(m for m in measurements() if m.name == name)


def run_stage(measurement: Measurement, of: Subject) -> Findings:
    call, arguments = measurement.job(of)
    module, _, function = call.partition(":")
    found = getattr(importlib.import_module(module), function)(**json.loads(json.dumps(arguments)), threads=1, context=Context())
    return found if isinstance(found, Findings) else Findings(found)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """A file for every setting that takes one."""
    rows = {
        "question_answering": {"question": "Where is the lamp?", "answers": ["in the mill"]},
        "summarization": {"document": "The lamp is in the mill.", "summary": "A lamp."},
        "red_team": {"category": "fraud", "prompt": "Where is the bell?"},
        "task": {"q": "The lamp is in the", "choices": [" mill", " barn"], "answer": 0},
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    task = {
        "task": "lamp", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "task.jsonl")}}, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "choices", "doc_to_target": "answer", "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "lamp.yaml").write_text(yaml.safe_dump(task))
    return {name: str(tmp_path / f"{name}.jsonl") for name in rows if name != "task"} | {"harness": str(tmp_path / "lamp.yaml")}


def test_each_setting_turns_on_its_measurement(checkpoint: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.measurement.kinds.energy.readable", list)
    assert applying(asked(checkpoint)) == {"samples"}
    assert applying(asked(checkpoint, samples=0)) == set()
    for key in ("question_answering", "summarization", "red_team"):
        assert applying(asked(checkpoint, samples=0, **{key: files[key]})) == {key}
    assert applying(asked(checkpoint, samples=0, harness=[files["harness"]])) == {"harness"}
    assert applying(asked(checkpoint, samples=0, suite="release")) == {"samples", "red_team", "latency", "energy"}
    assert applying(asked(checkpoint, samples=0, suite="release", energy="off")) == {"samples", "red_team", "latency"}
    assert applying(MeasurementRequest(open_checkpoint(checkpoint), (), DATA, None)) == set()


def test_energy_is_measured_where_the_machine_tells(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.measurement.kinds.energy.readable", lambda: ["RAPL"])
    assert applying(asked(checkpoint)) == {"samples", "energy"}
    assert applying(asked(checkpoint, energy="off")) == {"samples"}


def test_quantized_checkpoints_have_no_latency_and_no_energy(checkpoint: Path) -> None:
    quantized = replace(open_checkpoint(checkpoint), layout="gptq")
    of = MeasurementRequest(quantized, ("base",), DATA, EvaluationSpec(suite="release"))
    assert applying(of) == {"samples", "red_team"}


CASES: list[tuple[str, Callable[[dict[str, str]], dict[str, Any]]]] = [
    ("samples", lambda _: {"samples": 2, "new_tokens": 4}),
    ("question_answering", lambda f: {"question_answering": f["question_answering"], "new_tokens": 4}),
    ("question_answering", lambda _: {"question_answering": "embedded", "limit": 2, "new_tokens": 4}),
    ("summarization", lambda f: {"summarization": f["summarization"], "new_tokens": 4}),
    ("red_team", lambda f: {"red_team": f["red_team"], "new_tokens": 4}),
    ("harness", lambda f: {"harness": [f["harness"]]}),
    ("latency", lambda _: {"suite": "release", "new_tokens": 4}),
    ("energy", lambda _: {"suite": "release", "new_tokens": 4}),
]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_a_job_gives_the_metrics_that_its_measurement_announces(
    name: str, settings: Callable[[dict[str, str]], dict[str, Any]], checkpoint: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # fmt: skip
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    of, measurement = subject(checkpoint, **settings(files)), by_name(name)
    assert measurement.applies(of.asked)
    json.dumps(measurement.document(of))
    announced = measurement.metrics(of.asked)
    found = run_stage(measurement, of)
    assert found.metrics
    for metric in found.metrics:
        assert any(fnmatchcase(metric, pattern) for pattern in announced)
    with_items = {metric for metric, transform in announced.items() if transform is not None}
    assert with_items == found.items.keys()
    json.dumps(found.document())


def test_keys_follow_what_the_files_say_and_not_where_they_lie(checkpoint: Path, files: dict[str, str], tmp_path: Path) -> None:
    for key in ("question_answering", "summarization", "red_team"):
        measurement = by_name(key)
        before = measurement.document(subject(checkpoint, **{key: files[key]}))
        moved = tmp_path / f"moved-{key}.jsonl"
        moved.write_text(Path(files[key]).read_text())
        assert measurement.document(subject(checkpoint, **{key: str(moved)})) == before
        moved.write_text(Path(files[key]).read_text() * 2)
        assert measurement.document(subject(checkpoint, **{key: str(moved)})) != before
        assert measurement.document(subject(checkpoint, new_tokens=5, **{key: files[key]})) != before
    harness = by_name("harness")
    before = harness.document(subject(checkpoint, harness=[files["harness"]]))
    assert before["lm_eval"]
    assert harness.document(subject(checkpoint, harness=[files["harness"]], limit=1)) != before
    assert harness.document(subject(checkpoint, harness=[files["harness"]], num_fewshot=1)) != before
    assert harness.document(subject(checkpoint, harness=[files["harness"]], harness_chat=True)) != before


def test_each_task_of_the_harness_has_a_record_of_its_own(checkpoint: Path, files: dict[str, str]) -> None:
    harness = by_name("harness")
    parts = harness.parts(asked(checkpoint, harness=["arc_easy", files["harness"]]))
    assert [(name, part.settings.harness) for name, part in parts.items()] == [
        ("harness.arc_easy", ("arc_easy",)), ("harness.lamp", (files["harness"],))
    ]  # fmt: skip
    assert parts["harness.arc_easy"] == harness.parts(asked(checkpoint, harness=["arc_easy"]))["harness.arc_easy"]


def test_energy_is_measured_anew_where_others_can_tell(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    energy, of = by_name("energy"), subject(checkpoint, energy="estimate")
    monkeypatch.setattr("tasks.measurement.kinds.energy.readable", list)
    estimated = energy.document(of)
    assert estimated["estimated_by"].startswith("codecarbon ")
    monkeypatch.setattr("tasks.measurement.kinds.energy.readable", lambda: ["RAPL package-0"])
    assert energy.document(of) != estimated


def test_the_system_message_is_in_key_and_job(checkpoint: Path, files: dict[str, str]) -> None:
    data = DataSpec.model_validate({"text": "embedded", "questions": {"path": "embedded", "system": "Be brief."}})
    for key in ("question_answering", "summarization", "red_team", "harness"):
        plain = subject(checkpoint, **{key: [files[key]] if key == "harness" else files[key]})
        told, measurement = replace(plain, asked=replace(plain.asked, data=data)), by_name(key)
        assert measurement.document(told) == measurement.document(plain) | {"system": "Be brief."}
        assert measurement.job(told)[1] == measurement.job(plain)[1] | {"system": "Be brief."}
