"""An entry that is removed or damaged while a run goes on: the stage that needs it says so, and makes nothing of it."""

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
from tasks.execution import RunContext, _run_child
from tasks.planned_stage import PlannedStage, Result
from tasks.runners.executor import JobResult
from tasks.stage import Stage, stage_kinds
from tasks.store.identity import Machine, digest
from tasks.store.store import Entry, Store
from tests.tasks.entries import commit, document_of


class Child:
    """In place of the children: does what a test wants in the middle of the work."""

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


def compute(store: Store, parent: Entry, child: Child, data: Path | None = None, outside: Base | None = None) -> Entry:
    """The stage after `parent`, as a running pipeline would compute it; one that reads `data`, and another model."""
    stage: Stage = stage_kinds()["prune.width"].model_validate({"uses": "prune.width", "keep": 0.5})
    spec, document = DataSpec.model_validate({"text": "embedded"}), document_of("child", [parent.identity])
    if data is not None:
        stage = stage_kinds()["finetune"].model_validate({"uses": "finetune"})
        spec = DataSpec.model_validate({"text": {"path": str(data)}})
        document["data"] = fingerprint(spec, "training")
    before = Result("pruned", "prune.width", ["base"], "Completed", parent.identity, path=str(parent.path), content=parent.content)
    identity = digest(document)
    task = PlannedStage(
        "again", 2, stage, identity, document,
        {"parent": "pruned"}, ("base", "pruned"), cast(Any, SimpleNamespace()), outside={"teacher": outside} if outside else {},
    )  # fmt: skip
    pipeline = cast(
        RunContext,
        SimpleNamespace(
            store=store, executor=child, tracking=SimpleNamespace(log_curve=lambda *_: None), base=SimpleNamespace(identity="base"), progress=None,
            data=spec, machine=Machine(), results={"pruned": before}, documents={},
        ),
    )  # fmt: skip
    return _run_child(pipeline, task, stage, Result("again", "prune.width", ["pruned"], "Running", identity))


def test_a_whole_input_is_no_matter(store: Store) -> None:
    made = compute(store, commit(store), Child(lambda: None))
    assert store.get(made.identity) == made


def damage(entry: Entry) -> None:
    (entry.path / "model.safetensors").write_text("weightz")


def delete(entry: Entry) -> None:
    shutil.rmtree(entry.path.parent)


@pytest.mark.parametrize("loss", [damage, delete])
def test_of_an_input_lost_before_the_stage_nothing_is_made(store: Store, loss: Callable[[Entry], None]) -> None:
    parent, child = commit(store), Child(lambda: None)
    loss(parent)
    with pytest.raises(
        EdgepressError, match=rf"result of pruned \({parent.identity[:12]}\) was removed .* the same command computes it again"
    ):
        compute(store, parent, child)
    assert child.calls == 0 and store.entries() == []


@pytest.mark.parametrize("failure", [JobFailed("FileNotFoundError: config.json", transient=True), EdgepressError("no config.json")])
def test_an_input_lost_under_the_stage_is_told_as_the_reason(store: Store, failure: Exception) -> None:
    parent = commit(store)

    def lose() -> None:
        delete(parent)
        raise failure

    with pytest.raises(EdgepressError, match="result of pruned .* was removed"):
        compute(store, parent, Child(lose))


@pytest.mark.parametrize("failure", [JobFailed("killed", transient=True), EdgepressError("too narrow"), Cancelled()])
def test_another_failure_keeps_its_reason(store: Store, failure: Exception) -> None:
    parent = commit(store)

    def fail() -> None:
        raise failure

    with pytest.raises(type(failure), match=str(failure)):
        compute(store, parent, Child(fail))
    assert store.get(parent.identity) == parent


def test_data_that_change_meanwhile_make_nothing(store: Store, tmp_path: Path) -> None:
    """What was made of them would stand in the store under the identity of the old ones."""
    data, parent = tmp_path / "data.txt", commit(store)
    data.write_text("one\n\ntwo\n\nthree\n")
    with pytest.raises(EdgepressError, match="the recipe's data changed while this run was going on"):
        compute(store, parent, Child(lambda: data.write_text("one\n\ntwo\n\nfour\n") and None), data)
    assert store.entries() == [parent.identity] and list((store.root / "work").iterdir()) == []
    made = compute(store, parent, Child(lambda: None), data)  # what is there now
    assert sorted(store.entries()) == sorted([parent.identity, made.identity])


def test_a_model_that_changes_meanwhile_makes_nothing(store: Store, tmp_path: Path, checkpoint: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "teacher")
    teacher, parent = open_base(str(tmp_path / "teacher"), None, None, store.root), commit(store)
    with pytest.raises(EdgepressError, match="the model .*teacher changed while this run was going on"):
        compute(store, parent, Child(lambda: (tmp_path / "teacher" / "README.md").write_text("new") and None), outside=teacher)
    assert store.entries() == [parent.identity]
