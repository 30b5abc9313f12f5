"""An entry that is removed or damaged while a run goes on: the stage that needs it says so, and makes nothing of it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from compression.data import DataSpec
from compression.errors import EdgepressError
from tasks.children import Done, JobFailed, Stopped
from tasks.identity import Machine
from tasks.perform import Assignment, Pipeline, Result, _run_child
from tasks.stage import Stage, stage_kinds
from tasks.store import Entry, Store
from tests.tasks.entries import commit, document_of, identity_of


class Child:
    """In place of the children: does what a test wants in the middle of the work."""

    def __init__(self, work: Callable[[], None]):
        self.work, self.calls, self.closed = work, 0, False

    def run(self, job: Any, folder: Path, sink: Any) -> Done:
        self.calls += 1
        self.work()
        (folder / "out" / "model.safetensors").write_text("made")
        return Done({}, 1.0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def compute(store: Store, parent: Entry, child: Child) -> Entry:
    """The stage after `parent`, as a running pipeline would compute it."""
    stage: Stage = stage_kinds()["prune.width"].model_validate({"uses": "prune.width", "keep": 0.5})
    before = Result("pruned", "prune.width", ["base"], "Completed", parent.identity, path=str(parent.path), content=parent.content)
    identity = identity_of("child", [parent.identity])
    task = Assignment(
        "again", 2, stage, identity, document_of("child", [parent.identity]), {"parent": "pruned"}, ("base", "pruned"), cast(Any, SimpleNamespace())
    )  # fmt: skip
    pipeline = cast(
        Pipeline,
        SimpleNamespace(
            store=store, children=child, tracking=SimpleNamespace(log_curve=lambda *_: None), base=SimpleNamespace(identity="base"), progress=None,
            data=DataSpec.model_validate({"text": "embedded"}), machine=Machine(), results={"pruned": before}, documents={},
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


@pytest.mark.parametrize("failure", [JobFailed("killed", transient=True), EdgepressError("too narrow"), Stopped()])
def test_another_failure_keeps_its_reason(store: Store, failure: Exception) -> None:
    parent = commit(store)

    def fail() -> None:
        raise failure

    with pytest.raises(type(failure), match=str(failure)):
        compute(store, parent, Child(fail))
    assert store.get(parent.identity) == parent
