"""Records: what makes their keys, what they keep, and what is computed from two of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compression.checkpoints.checkpoint import open_checkpoint
from compression.data import DataSpec
from compression.evaluation.findings import Items
from compression.evaluation.spec import EvaluationSpec
from tasks.execution import _compare_speed
from tasks.measurement import measure as module
from tasks.measurement.measure import Measured, compare, known_metrics, measure
from tasks.measurement.measurement import Measurement, MeasurementRequest, ReferenceModel, Subject
from tasks.planned_stage import Result
from tasks.runners.executor import Job, JobResult
from tasks.stage import Artifact, Planned
from tasks.store.identity import Machine
from tasks.store.store import Store

SPEC = DataSpec.model_validate(
    {"text": "embedded", "questions": "embedded", "length": 32, "evaluation_windows": 4, "evaluation_questions": 4}
)
RIGHT = Items((1.0, 1.0, 0.0, 1.0), (1.0,) * 4)


GRADED = Measurement(
    "graded",
    1,
    lambda _: {"grade": "mean", "grade.*": None},
    lambda _: {"data": "digest"},
    wanted=lambda evaluation: evaluation.samples > 0,
)
TIMED = replace(GRADED, name="timed", exclusive=True)


class FakeExecutor:
    """Answers every job alike and remembers them."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def run(self, job: Job, folder: Path, on_event: Any) -> JobResult:
        self.jobs.append(job)
        return JobResult({"grade": 0.75}, 2.0, {"grade": RIGHT}, {"texts": ["hello"]})


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> list[Measurement]:
    """The table of measurements, which a test may change."""
    kinds = [GRADED]
    monkeypatch.setattr(module, "MEASUREMENTS", kinds)
    return kinds


@pytest.fixture
def subject(checkpoint: Path) -> Subject:
    request = MeasurementRequest(open_checkpoint(checkpoint), (), SPEC, EvaluationSpec())
    return Subject(request, ReferenceModel(checkpoint, "c" * 64), {}, checkpoint, Machine())


def take(subject: Subject, executor: FakeExecutor, tmp_path: Path) -> Measured:
    return measure(subject, Store(tmp_path / "store"), executor, lambda event: None)  # type: ignore[arg-type]


def test_record_is_computed_once(kinds: list[Measurement], subject: Subject, tmp_path: Path) -> None:
    executor = FakeExecutor()
    first, again = take(subject, executor, tmp_path), take(subject, executor, tmp_path)
    assert len(executor.jobs) == 1 and (first.seconds, again.seconds) == (2.0, 0.0)
    assert replace(first, seconds=0.0) == again
    assert again.items == {"grade": RIGHT} and again.details == {"texts": ["hello"]}
    assert again.metrics["grade_low"] < again.metrics["grade"] == 0.75 < again.metrics["grade_high"] == 1.0
    (key,) = Store(tmp_path / "store").records()
    assert again.keys == {"graded": key}


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {"target": ReferenceModel(s.target.path, "d" * 64)},
        lambda s: {"machine": Machine("cpu", 7)},
        lambda s: {"machine": Machine("cuda", 2)},
    ],
)
def test_bytes_device_and_threads_change_key(kinds: list[Measurement], subject: Subject, tmp_path: Path, change: Any) -> None:
    executor = FakeExecutor()
    take(subject, executor, tmp_path)
    take(replace(subject, **change(subject)), executor, tmp_path)
    assert len(executor.jobs) == 2


def test_torch_version_changes_key(kinds: list[Measurement], subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = FakeExecutor()
    take(subject, executor, tmp_path)
    monkeypatch.setattr(module, "version", lambda package: f"another {package}")
    take(subject, executor, tmp_path)
    assert len(executor.jobs) == 2


def test_each_measurement_has_its_own_folder(kinds: list[Measurement], subject: Subject, tmp_path: Path) -> None:
    """Two runs at once may ask for the same base with other settings."""
    folders: list[Path] = []

    class Folders(FakeExecutor):
        def run(self, job: Job, folder: Path, on_event: Any) -> JobResult:
            folders.append(folder)
            return super().run(job, folder, on_event)

    for threads in (1, 2):
        take(replace(subject, machine=Machine("cpu", threads)), Folders(), tmp_path)
    keys = Store(tmp_path / "store").records()
    assert sorted(folder.name for folder in folders) == sorted(f"measure-{key}" for key in keys) and len(set(folders)) == 2


def test_added_part_computes_only_itself(kinds: list[Measurement], subject: Subject, tmp_path: Path) -> None:
    def with_tasks(*tasks: str) -> MeasurementRequest:
        return replace(subject.request, evaluation=EvaluationSpec(harness=tasks))

    kinds[:] = [
        replace(
            GRADED,
            settings=lambda request: {"tasks": request.evaluation.harness},
            split=lambda request: {f"graded.{task}": with_tasks(task) for task in request.evaluation.harness},
        )
    ]
    executor = FakeExecutor()
    take(replace(subject, request=with_tasks("a", "b")), executor, tmp_path)
    keys = take(replace(subject, request=with_tasks("c", "a", "b")), executor, tmp_path).keys
    assert len(executor.jobs) == 3 and list(keys) == ["graded.c", "graded.a", "graded.b"]


def test_only_exclusive_measurements_depend_on_the_machine(
    kinds: list[Measurement], subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds.append(TIMED)
    executor = FakeExecutor()
    take(subject, executor, tmp_path)
    monkeypatch.setattr(module, "machine_fingerprint", lambda: {"host": "another"})
    take(subject, executor, tmp_path)
    assert [job.exclusive for job in executor.jobs] == [False, True, True]


def test_remeasuring_repeats_timings_only(kinds: list[Measurement], subject: Subject, tmp_path: Path) -> None:
    kinds.append(TIMED)
    store, executor = Store(tmp_path / "store"), FakeExecutor()
    for remeasure in (False, True, False):
        measure(subject, store, executor, lambda event: None, remeasure=remeasure)  # type: ignore[arg-type]
    assert [job.name for job in executor.jobs] == ["graded", "timed", "timed"]
    assert len(store.records()) == 2


def test_inapplicable_measurement_is_skipped(kinds: list[Measurement], subject: Subject, tmp_path: Path) -> None:
    other = replace(subject, request=replace(subject.request, evaluation=EvaluationSpec(samples=0)))
    executor = FakeExecutor()
    assert take(other, executor, tmp_path) == Measured() and executor.jobs == []
    assert list(known_metrics(other.request)) == []


def test_comparison_is_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "store")
    base = Measured(items={"grade": RIGHT, "loss": Items((1.0, 3.0), (1.0, 1.0), "exp")}, keys={"graded": "a"})
    mine = Measured(items={"grade": Items((0.0, 1.0, 0.0, 1.0), (1.0,) * 4), "own": RIGHT}, keys={"graded": "b"})
    figures = compare(mine, base, "c" * 64, store)
    assert figures["grade_delta"] == -0.25 and figures["grade_delta_low"] < -0.25 < figures["grade_delta_high"] == 0
    assert figures.keys() == {"grade_delta", "grade_delta_low", "grade_delta_high"}
    monkeypatch.setattr("compression.evaluation.bootstrap.comparison_figures", None)
    assert compare(mine, base, "c" * 64, store) == figures
    (key,) = store.records()
    assert (store.record(key) or {})["key"]["content"] == "c" * 64  # kept as long as the content
    assert compare(Measured(), base, "c" * 64, store) == {}


def test_repeated_record_is_compared_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    base = Measured(items={"grade": RIGHT}, keys={"graded": "a"})
    before, after = (Measured(items={"grade": Items(sums, (1.0,) * 4)}, keys={"graded": "b"}) for sums in ((0.0,) * 4, (1.0,) * 4))
    assert [compare(mine, base, "c" * 64, store)["grade_delta"] for mine in (before, after, before)] == [-0.75, 0.25, -0.75]
    assert len(store.records()) == 2


def test_known_metrics_include_intervals_and_comparisons(checkpoint: Path) -> None:
    known = known_metrics(MeasurementRequest(open_checkpoint(checkpoint), ("base",), SPEC, EvaluationSpec()))
    assert {"accuracy_delta_low", "perplexity_ratio_high", "kl_to_base_high", "tokens_per_second_low"} <= known.keys()
    assert not {"kl_to_base_delta", "accuracy_ratio"} & known.keys()


@pytest.mark.parametrize(("layout", "timed"), [("dense", True), ("gptq", False), ("awq", False), ("w8a8", False)])
def test_quantized_checkpoints_have_no_speed(checkpoint: Path, layout: Any, timed: bool) -> None:
    planned: Planned = replace(open_checkpoint(checkpoint), layout=layout)
    assert ("tokens_per_second" in known_metrics(MeasurementRequest(planned, ("base",), SPEC, EvaluationSpec()))) == timed
    assert "tokens_per_second" in known_metrics(
        MeasurementRequest(Artifact("llama.cpp", "carried", 1), ("base", "parent"), SPEC, EvaluationSpec())
    )


def test_slowdown_within_noise_gives_no_warning() -> None:
    def row(name: str, speed: float, spread: float) -> Result:
        metrics = {"tokens_per_second": speed, "tokens_per_second_low": speed - spread, "tokens_per_second_high": speed + spread}
        return Result(name, "export.gguf", [], "Cached", runtime="llama.cpp", metrics=metrics)

    for spread, warned in ((1.0, True), (15.0, False)):
        mine = row("gguf", 85, spread)
        _compare_speed(mine, row("gptq", 100, spread))
        assert bool(mine.warnings) == warned
