"""An input that is removed, damaged or changed during a run: the stage that needs it names it, and commits nothing."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from compression.data import DataSpec, fingerprint
from compression.errors import EdgepressError
from tasks.base import Base, open_base
from tasks.errors import Cancelled, JobFailed
from tasks.execution import _compute_in_child
from tasks.planned_stage import PlannedStage, Result
from tasks.run_context import RunContext
from tasks.runners.executor import JobResult
from tasks.stage import Stage, stage_kinds
from tasks.store.identity import Machine, digest
from tasks.store.store import Entry, Store
from tests.tasks.entries import commit, document_of


class FakeExecutor:
    """An executor whose job is a function of the test, called in the middle of the work."""

    def __init__(self, work: Callable[[], None]):
        self.work, self.calls, self.closed = work, 0, False

    def run(self, job: Any, folder: Path, on_event: Any) -> JobResult:
        self.calls += 1
        self.work()
        (folder / "out" / "model.safetensors").write_text("made")
        return JobResult({}, 1.0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def compute(store: Store, parent: Entry, executor: FakeExecutor, data: Path | None = None, outside: Base | None = None) -> Entry:
    """Compute the stage after `parent` as a run does; it reads `data` and the model `outside`, if given."""
    stage: Stage = stage_kinds()["prune.width"].model_validate({"uses": "prune.width", "keep": 0.5})
    spec, document = DataSpec.model_validate({"text": "embedded"}), document_of("child", [parent.identity])
    if data is not None:
        stage = stage_kinds()["finetune"].model_validate({"uses": "finetune"})
        spec = DataSpec.model_validate({"text": {"path": str(data)}})
        document["data"] = fingerprint(spec, "training")
    pruned = Result("pruned", "prune.width", ["base"], "Completed", parent.identity, path=str(parent.path), content=parent.content)
    identity = digest(document)
    planned = PlannedStage(
        "tuned", 2, stage, identity, document,
        {"parent": "pruned"}, ("base", "pruned"), cast(Any, SimpleNamespace()), outside={"teacher": outside} if outside else {},
    )  # fmt: skip
    context = cast(
        RunContext,
        SimpleNamespace(
            store=store, executor=executor, tracking=SimpleNamespace(log_curve=lambda *_: None), base=SimpleNamespace(identity="base"), progress=None,
            data=spec, machine=Machine(), results={"pruned": pruned}, documents={},
        ),
    )  # fmt: skip
    return _compute_in_child(context, planned, stage, Result("tuned", "prune.width", ["pruned"], "Running", identity))


def test_stage_with_intact_inputs_commits(store: Store) -> None:
    entry = compute(store, commit(store), FakeExecutor(lambda: None))
    assert store.get(entry.identity) == entry


def damage(entry: Entry) -> None:
    (entry.path / "model.safetensors").write_text("weightz")


def delete(entry: Entry) -> None:
    shutil.rmtree(entry.path.parent)


@pytest.mark.parametrize("loss", [damage, delete])
def test_input_lost_before_the_stage_starts_nothing(store: Store, loss: Callable[[Entry], None]) -> None:
    parent, executor = commit(store), FakeExecutor(lambda: None)
    loss(parent)
    with pytest.raises(EdgepressError, match=rf"pruned \({parent.identity[:12]}\) was removed"):
        compute(store, parent, executor)
    assert executor.calls == 0 and store.entries() == []


@pytest.mark.parametrize("failure", [JobFailed("FileNotFoundError: config.json", transient=True), EdgepressError("no config.json")])
def test_input_lost_during_the_stage_is_the_reason(store: Store, failure: Exception) -> None:
    parent = commit(store)

    def lose() -> None:
        delete(parent)
        raise failure

    with pytest.raises(EdgepressError, match="pruned .* was removed"):
        compute(store, parent, FakeExecutor(lose))


@pytest.mark.parametrize("failure", [JobFailed("killed", transient=True), EdgepressError("too narrow"), Cancelled()])
def test_other_failures_keep_their_reason(store: Store, failure: Exception) -> None:
    parent = commit(store)

    def fail() -> None:
        raise failure

    with pytest.raises(type(failure), match=str(failure)):
        compute(store, parent, FakeExecutor(fail))
    assert store.get(parent.identity) == parent


def test_data_changed_during_the_stage_commit_nothing(store: Store, tmp_path: Path) -> None:
    """The result would have the identity of the old data."""
    data, parent = tmp_path / "data.txt", commit(store)
    data.write_text("one\n\ntwo\n\nthree\n")
    with pytest.raises(EdgepressError, match="the recipe's data changed"):
        compute(store, parent, FakeExecutor(lambda: data.write_text("one\n\ntwo\n\nfour\n") and None), data)
    assert store.entries() == [parent.identity] and list((store.root / "work").iterdir()) == []
    entry = compute(store, parent, FakeExecutor(lambda: None), data)  # what is there now
    assert sorted(store.entries()) == sorted([parent.identity, entry.identity])


def test_model_changed_during_the_stage_commits_nothing(store: Store, tmp_path: Path, checkpoint: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "teacher")
    teacher, parent = open_base(str(tmp_path / "teacher"), None, None, store.root), commit(store)
    with pytest.raises(EdgepressError, match="the model .*teacher changed"):
        compute(store, parent, FakeExecutor(lambda: (tmp_path / "teacher" / "README.md").write_text("new") and None), outside=teacher)
    assert store.entries() == [parent.identity]
