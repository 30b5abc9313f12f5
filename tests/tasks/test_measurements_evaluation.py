"""The table of measurements: when each applies, what its key covers, and that its job gives the metrics it announces."""

import importlib
import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from compression.checkpoints.checkpoint import open_checkpoint
from compression.context import Context
from compression.data import DataSpec
from compression.evaluation.findings import Findings
from compression.evaluation.spec import EvaluationSpec
from tasks.measurement.jobs import JOBS
from tasks.measurement.kinds import MEASUREMENTS
from tasks.measurement.measure import make_job, measure
from tasks.measurement.measurement import Measurement, MeasurementRequest, ReferenceModel, Subject
from tasks.runners.executor import Job, JobResult
from tasks.store.identity import Machine
from tasks.store.store import Store

OPTIONAL = {"samples", "question_answering", "summarization", "red_team", "harness", "latency", "energy"}
DATA = DataSpec.model_validate(
    {"text": "embedded", "questions": "embedded", "length": 32, "evaluation_windows": 4, "evaluation_questions": 2}
)


KINDS = {measurement.name: measurement for measurement in MEASUREMENTS}


def request(checkpoint: Path, **settings: Any) -> MeasurementRequest:
    return MeasurementRequest(open_checkpoint(checkpoint), ("base",), DATA, EvaluationSpec.model_validate(settings))


def applying(of: MeasurementRequest) -> set[str]:
    return {measurement.name for measurement in MEASUREMENTS if measurement.applies(of)} & OPTIONAL


def run_job(measurement: Measurement, of: MeasurementRequest, checkpoint: Path) -> Findings:
    references = {role: ReferenceModel(checkpoint, "1" * 64) for role in of.roles}
    job = make_job(measurement, Subject(of, ReferenceModel(checkpoint, "0" * 64), references, checkpoint, Machine("cpu", 1)))
    module, _, function = job.call.partition(":")
    arguments = json.loads(json.dumps(job.arguments))
    findings = getattr(importlib.import_module(module), function)(**arguments, threads=1, context=Context())
    return findings if isinstance(findings, Findings) else Findings(findings)


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
    monkeypatch.setattr("compression.evaluation.energy.readable", list)
    assert applying(request(checkpoint)) == {"samples"}
    assert applying(request(checkpoint, samples=0)) == set()
    for key in ("question_answering", "summarization", "red_team"):
        assert applying(request(checkpoint, samples=0, **{key: files[key]})) == {key}
    assert applying(request(checkpoint, samples=0, harness=[files["harness"]])) == {"harness"}
    assert applying(request(checkpoint, samples=0, suite="release")) == {"samples", "red_team", "latency", "energy"}
    assert applying(request(checkpoint, samples=0, suite="release", energy="off")) == {"samples", "red_team", "latency"}


def test_energy_is_measured_where_counters_are_readable(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compression.evaluation.energy.readable", lambda: ["RAPL"])
    assert applying(request(checkpoint)) == {"samples", "energy"}
    assert applying(request(checkpoint, energy="off")) == {"samples"}


def test_quantized_checkpoints_have_no_figures_of_the_machine(checkpoint: Path) -> None:
    quantized = replace(request(checkpoint, suite="release"), planned=replace(open_checkpoint(checkpoint), layout="gptq"))
    assert applying(quantized) == {"samples", "red_team"}


def test_every_measurement_has_a_job() -> None:
    assert list(JOBS) == list(KINDS) == sorted(KINDS)


CASES: list[tuple[str, Callable[[dict[str, str]], dict[str, Any]]]] = [
    ("quality", lambda _: {}),
    ("speed", lambda _: {}),
    ("samples", lambda _: {"samples": 2, "new_tokens": 4}),
    ("question_answering", lambda f: {"question_answering": f["question_answering"], "new_tokens": 4}),
    ("question_answering", lambda _: {"question_answering": "embedded", "limit": 2, "new_tokens": 4}),
    ("summarization", lambda f: {"summarization": f["summarization"], "new_tokens": 4}),
    ("red_team", lambda f: {"red_team": f["red_team"], "new_tokens": 4}),
    ("harness", lambda f: {"harness": [f["harness"]]}),
    ("latency", lambda _: {"suite": "release", "new_tokens": 4}),
    ("energy", lambda _: {"suite": "release", "new_tokens": 4}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_job_gives_announced_metrics(
    name: str, settings: Callable[[dict[str, str]], dict[str, Any]], checkpoint: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # fmt: skip
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    of, measurement = request(checkpoint, **settings(files)), KINDS[name]
    assert measurement.applies(of)
    announced = measurement.metrics(of)
    findings = run_job(measurement, of, checkpoint)
    assert findings.metrics.keys() == announced.keys() if name == "quality" else findings.metrics
    for metric in findings.metrics:
        assert any(fnmatchcase(metric, pattern) for pattern in announced)
    with_items = {metric: transform for metric, transform in announced.items() if transform is not None}
    assert with_items == {metric: items.transform for metric, items in findings.items.items()}
    json.dumps(findings.document())


def test_keys_cover_contents_not_paths(checkpoint: Path, files: dict[str, str], tmp_path: Path) -> None:
    def document(key: str, **settings: Any) -> dict[str, Any]:
        return KINDS[key].document(request(checkpoint, **settings))

    for key in ("question_answering", "summarization", "red_team"):
        before = document(key, **{key: files[key]})
        moved = tmp_path / f"moved-{key}.jsonl"
        moved.write_text(Path(files[key]).read_text())
        assert document(key, **{key: str(moved)}) == before
        moved.write_text(Path(files[key]).read_text() * 2)
        assert document(key, **{key: str(moved)}) != before
        assert document(key, new_tokens=5, **{key: files[key]}) != before
    before = document("harness", harness=[files["harness"]])
    assert before["lm_eval"]
    changes: list[dict[str, Any]] = [{"limit": 1}, {"num_fewshot": 1}, {"harness_chat": True}]
    assert all(document("harness", harness=[files["harness"]], **change) != before for change in changes)


def test_each_harness_task_has_its_own_record(checkpoint: Path, files: dict[str, str]) -> None:
    harness = KINDS["harness"]
    parts = harness.parts(request(checkpoint, harness=["arc_easy", files["harness"]]))
    assert [(name, part.evaluation.harness) for name, part in parts.items()] == [
        ("harness.arc_easy", ("arc_easy",)), ("harness.lamp", (files["harness"],))
    ]  # fmt: skip
    assert parts["harness.arc_easy"] == harness.parts(request(checkpoint, harness=["arc_easy"]))["harness.arc_easy"]


def test_other_counters_give_another_energy_key(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    energy, of = KINDS["energy"], request(checkpoint, energy="estimate")
    monkeypatch.setattr("compression.evaluation.energy.readable", list)
    estimated = energy.document(of)
    assert estimated["estimated_by"].startswith("codecarbon ")
    monkeypatch.setattr("compression.evaluation.energy.readable", lambda: ["RAPL package-0"])
    assert energy.document(of) != estimated


def test_system_message_is_in_keys(checkpoint: Path, files: dict[str, str]) -> None:
    data = DataSpec.model_validate({"text": "embedded", "questions": {"path": "embedded", "system": "Be brief."}})
    for key in ("question_answering", "summarization", "red_team", "harness"):
        plain, measurement = request(checkpoint, **{key: [files[key]] if key == "harness" else files[key]}), KINDS[key]
        assert measurement.document(replace(plain, data=data)) == measurement.document(plain) | {"system": "Be brief."}


PINNED_KEYS = {
    "energy": "7af3f6e7f0df0b973688946752ae4cebdd522f37fbddd4e3f84536d2c68342eb",
    "harness.lamp": "8e172cd17a892c3a1a4a89b0f4cd69f0c4372b946e3e9593f97b196d97dd778e",
    "latency": "71443d8bad198724b103b703a1c0cd25d25d6d056005cccb4155cc7bd6beae2a",
    "quality": "3bd9f3c6699d0767ece2583217ccb3b24c431e24192d06f56eae873a2d9bc0c4",
    "question_answering": "64b7e9e74d6bae43fc46db92ab9562c0e07d4aa1f63c459a4ec8295d11845d90",
    "red_team": "727b0705dabc5e58bcaa9dd131de326e5bfe02cdcac08fa5a06c4c7ca1f60e76",
    "samples": "28a35af45c07eb881a900948f08c3f33ab303ed2a264e356a6338a0118efe167",
    "speed": "1038041031a5c8c4d3cb6fd3de0ac531c9dbf23131693c04117893efc9679c16",
    "summarization": "71035f63ed09d1bb31882f8c8bd76832e9f93218f25d0e1ffc62f2bd662495b4",
}


class Recorder:
    """An executor that answers every job alike."""

    closed = False

    def run(self, job: Job, folder: Path, on_event: Any) -> JobResult:
        return JobResult({}, 0.0, {}, {})


def test_record_keys_stay_those_of_earlier_versions(
    checkpoint: Path, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that changes makes every stored measurement of its kind worthless."""
    packages = {"lm-eval": "0.4.13", "rouge-score": "0.1.2", "codecarbon": "3.2.6"}
    real = importlib.metadata.distribution
    monkeypatch.setattr(
        "importlib.metadata.distribution", lambda name: SimpleNamespace(version=packages[name]) if name in packages else real(name)
    )
    monkeypatch.setattr("tasks.measurement.measure.version", lambda _: "2.13.0")
    monkeypatch.setattr("tasks.measurement.measure.installed_runtimes", lambda: {"transformers": "5.23.0"})
    monkeypatch.setattr("tasks.measurement.measure.machine_fingerprint", lambda: {"host": "edge", "cores": 2})
    monkeypatch.setattr("compression.evaluation.energy.readable", lambda: ["RAPL package-0"])
    data = DataSpec.model_validate(DATA.model_dump() | {"questions": {"path": "embedded", "system": "Be brief."}})
    of = MeasurementRequest(
        open_checkpoint(checkpoint), ("base", "parent"), data,
        EvaluationSpec.model_validate({"suite": "release", "limit": 2, "num_fewshot": 1, "harness_chat": True, **files, "harness": [files["harness"]]}),
    )  # fmt: skip
    references = {role: ReferenceModel(checkpoint, digit * 64) for role, digit in (("base", "1"), ("parent", "2"))}
    subject = Subject(of, ReferenceModel(checkpoint, "0" * 64), references, checkpoint, Machine("cpu", 2))
    measured = measure(subject, Store(tmp_path / "store"), Recorder(), lambda event: None)  # type: ignore[arg-type]
    assert measured.keys == PINNED_KEYS
