"""Records: what makes their keys, what they keep, and what is computed from two of them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from compression.checkpoints.checkpoint import open_checkpoint
from compression.context import Context
from compression.data import DataSpec
from compression.evaluation.findings import Items, Transform
from tasks.execution import _compare_speed
from tasks.measurement import measure as module
from tasks.measurement.measure import Measured, compare, known_metrics, measure
from tasks.measurement.measurement import Measurement, MeasurementRequest, ReferenceModel, Subject, measurements
from tasks.planned_stage import Result
from tasks.runners.executor import Job, JobResult
from tasks.runners.jobs import measure_quality
from tasks.stage import Artifact, Planned
from tasks.store.identity import Machine
from tasks.store.store import Store

SPEC = DataSpec.model_validate(
    {"text": "embedded", "questions": "embedded", "length": 32, "evaluation_windows": 4, "evaluation_questions": 4}
)
RIGHT = Items((1.0, 1.0, 0.0, 1.0), (1.0,) * 4)


class Graded(Measurement):
    """Gives a grade with items, and says when it applies."""

    name: ClassVar[str] = "graded"
    version: ClassVar[int] = 1

    def applies(self, asked: MeasurementRequest) -> bool:
        return asked.settings == "graded"

    def metrics(self, asked: MeasurementRequest) -> Mapping[str, Transform | None]:
        return {"grade": "mean", "grade.*": None}

    def document(self, subject: Subject) -> dict[str, Any]:
        return {"data": "digest"}

    def job(self, subject: Subject) -> tuple[str, dict[str, Any]]:
        return "tests:grade", {"target": str(subject.target.path)}


class Timed(Graded):
    name: ClassVar[str] = "timed"
    exclusive: ClassVar[bool] = True


class FakeExecutor:
    """Answers every job alike and remembers them."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def run(self, job: Job, folder: Path, on_event: Any) -> JobResult:
        self.jobs.append(job)
        return JobResult({"grade": 0.75}, 2.0, {"grade": RIGHT}, {"texts": ["hello"]})


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Measurement]:
    kinds: list[Measurement] = [Graded()]
    monkeypatch.setattr(module, "measurements", lambda: tuple(kinds))
    return kinds


@pytest.fixture
def subject(checkpoint: Path) -> Subject:
    asked = MeasurementRequest(open_checkpoint(checkpoint), (), SPEC, "graded")
    return Subject(asked, ReferenceModel(checkpoint, "c" * 64), {}, checkpoint, Machine())


def take(subject: Subject, executor: FakeExecutor, tmp_path: Path) -> Measured:
    return measure(subject, Store(tmp_path / "store"), executor, lambda event: None)  # type: ignore[arg-type]


def test_a_record_is_made_once_and_keeps_metrics_intervals_items_and_details(
    found: list[Measurement], subject: Subject, tmp_path: Path
) -> None:
    executor = FakeExecutor()
    first, again = take(subject, executor, tmp_path), take(subject, executor, tmp_path)
    assert len(executor.jobs) == 1 and (first.seconds, again.seconds) == (2.0, 0.0)
    assert dataclasses.replace(first, seconds=0.0) == again
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
def test_other_bytes_device_or_threads_are_measured_anew(found: list[Measurement], subject: Subject, tmp_path: Path, change: Any) -> None:
    executor = FakeExecutor()
    take(subject, executor, tmp_path)
    take(dataclasses.replace(subject, **change(subject)), executor, tmp_path)
    assert len(executor.jobs) == 2


def test_another_torch_is_another_runtime(
    found: list[Measurement], subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = FakeExecutor()
    take(subject, executor, tmp_path)
    monkeypatch.setattr(module, "version", lambda package: f"another {package}")
    take(subject, executor, tmp_path)
    assert len(executor.jobs) == 2


def test_two_measurements_of_one_target_do_not_meet_in_one_folder(found: list[Measurement], subject: Subject, tmp_path: Path) -> None:
    """Two runs at once may ask for the same base with other settings."""
    folders: list[Path] = []

    class Folders(FakeExecutor):
        def run(self, job: Job, folder: Path, on_event: Any) -> JobResult:
            folders.append(folder)
            return super().run(job, folder, on_event)

    for threads in (1, 2):
        take(dataclasses.replace(subject, machine=Machine("cpu", threads)), Folders(), tmp_path)
    keys = Store(tmp_path / "store").records()
    assert sorted(folder.name for folder in folders) == sorted(f"measure-{key}" for key in keys) and len(set(folders)) == 2


class Parted(Graded):
    name: ClassVar[str] = "parted"

    def parts(self, asked: MeasurementRequest) -> Mapping[str, MeasurementRequest]:
        return {f"parted {part}": dataclasses.replace(asked, settings=part) for part in asked.settings}

    def applies(self, asked: MeasurementRequest) -> bool:
        return True

    def document(self, subject: Subject) -> dict[str, Any]:
        return {"part": subject.asked.settings}


def test_one_more_part_computes_only_that(found: list[Measurement], subject: Subject, tmp_path: Path) -> None:
    found[:] = [Parted()]
    executor = FakeExecutor()
    take(dataclasses.replace(subject, asked=dataclasses.replace(subject.asked, settings="ab")), executor, tmp_path)
    keys = take(dataclasses.replace(subject, asked=dataclasses.replace(subject.asked, settings="cab")), executor, tmp_path).keys
    assert len(executor.jobs) == 3 and list(keys) == ["parted c", "parted a", "parted b"]


def test_only_what_is_taken_alone_depends_on_the_machine(
    found: list[Measurement], subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found.append(Timed())
    executor = FakeExecutor()
    take(subject, executor, tmp_path)
    monkeypatch.setattr(module, "machine_fingerprint", lambda: {"host": "another"})
    take(subject, executor, tmp_path)
    assert [job.exclusive for job in executor.jobs] == [False, True, True]


def test_timings_are_taken_again_when_asked_and_nothing_else(found: list[Measurement], subject: Subject, tmp_path: Path) -> None:
    found.append(Timed())
    store, executor = Store(tmp_path / "store"), FakeExecutor()
    for again in (False, True, False):
        measure(subject, store, executor, lambda event: None, again=again)  # type: ignore[arg-type]
    assert [job.name for job in executor.jobs] == ["graded", "timed", "timed"]
    assert len(store.records()) == 2


def test_what_does_not_apply_is_not_measured(found: list[Measurement], subject: Subject, tmp_path: Path) -> None:
    other = dataclasses.replace(subject, asked=dataclasses.replace(subject.asked, settings=None))
    executor = FakeExecutor()
    assert take(other, executor, tmp_path) == Measured() and executor.jobs == []
    assert list(known_metrics(other.asked)) == []


def test_a_comparison_with_the_base_is_a_record_of_two_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_record_made_again_is_compared_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    base = Measured(items={"grade": RIGHT}, keys={"graded": "a"})
    before, after = (Measured(items={"grade": Items(sums, (1.0,) * 4)}, keys={"graded": "b"}) for sums in ((0.0,) * 4, (1.0,) * 4))
    assert [compare(mine, base, "c" * 64, store)["grade_delta"] for mine in (before, after, before)] == [-0.75, 0.25, -0.75]
    assert len(store.records()) == 2


def test_every_metric_of_a_real_measurement_is_known_while_planning(checkpoint: Path) -> None:
    planned = open_checkpoint(checkpoint)
    asked = MeasurementRequest(planned, ("base",), SPEC, None)
    found = measure_quality(
        target=str(checkpoint), references={"base": str(checkpoint)}, tokenizer=str(checkpoint), data=SPEC.model_dump(mode="json"), threads=1,
        context=Context(),
    )  # fmt: skip
    (quality,) = (kind for kind in measurements() if kind.name == "quality")
    assert found.metrics.keys() == quality.metrics(asked).keys()
    assert {metric: items.transform for metric, items in found.items.items()} == {m: t for m, t in quality.metrics(asked).items() if t}
    known = known_metrics(asked)
    assert {"accuracy_delta_low", "perplexity_ratio_high", "kl_to_base_high", "tokens_per_second_low"} <= known.keys()
    assert not {"kl_to_base_delta", "accuracy_ratio"} & known.keys()


@pytest.mark.parametrize(("layout", "timed"), [("dense", True), ("gptq", False), ("awq", False), ("w8a8", False)])
def test_a_checkpoint_without_a_fast_kernel_has_no_speed(checkpoint: Path, layout: Any, timed: bool) -> None:
    planned: Planned = dataclasses.replace(open_checkpoint(checkpoint), layout=layout)
    assert ("tokens_per_second" in known_metrics(MeasurementRequest(planned, ("base",), SPEC, None))) == timed
    assert "tokens_per_second" in known_metrics(MeasurementRequest(Artifact("llama.cpp", "carried", 1), ("base", "parent"), SPEC, None))


def test_measurements_have_names_of_their_own() -> None:
    names = [measurement.name for measurement in measurements()]
    assert names == sorted(set(names)) and {"quality", "speed"} <= set(names)
    assert {m.name for m in measurements() if m.exclusive} >= {"speed"}


def test_slower_than_the_parent_is_said_only_beyond_the_noise_of_both() -> None:
    def row(name: str, speed: float, spread: float) -> Result:
        metrics = {"tokens_per_second": speed, "tokens_per_second_low": speed - spread, "tokens_per_second_high": speed + spread}
        return Result(name, "export.gguf", [], "Cached", runtime="llama.cpp", metrics=metrics)

    for spread, warned in ((1.0, True), (15.0, False)):
        mine = row("gguf", 85, spread)
        _compare_speed(mine, row("gptq", 100, spread))
        assert bool(mine.warnings) == warned
