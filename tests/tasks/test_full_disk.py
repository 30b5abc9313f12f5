"""A stage that fails leaves no half of its result: on a disk that it filled neither child nor flow could record the reason."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compression.errors import EdgepressError
from tasks.errors import Cancelled, JobFailed
from tasks.runners.budget import Budget
from tasks.runners.executor import Job, JobResult
from tasks.runners.local import LocalExecutor
from tasks.store.store import Store
from tests.tasks.entries import commit, identity_of
from tests.tasks.test_lost_inputs import FakeExecutor, compute


class FillingExecutor(FakeExecutor):
    """Real child processes, whose stage fills the disk through its `out` or its `work`."""

    def __init__(self, into: str):
        super().__init__(lambda: None)
        self.into, self.local = into, LocalExecutor(Budget(cores=1))
        self.local.preload()

    def run(self, job: Job, folder: Path, on_event: Any) -> JobResult:
        filling = replace(job, call="tests.tasks.jobs:run_filling_stage", arguments={**job.arguments, "into": self.into})
        return self.local.run(filling, folder, on_event)


@pytest.fixture(params=["out", "work"])
def filling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FillingExecutor]:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # for a machine lock of its own
    made = FillingExecutor(request.param)
    yield made
    made.local.close()


def test_full_disk_is_named_and_cleaned(small_disk: Path, filling: FillingExecutor) -> None:
    store = Store(small_disk / "store")
    parent = commit(store)
    with pytest.raises(JobFailed, match="no space left on the disk") as caught:
        compute(store, parent, filling)
    assert not caught.value.transient
    home = store.root / "work" / identity_of("child", [parent.identity])
    assert list((home / "out").iterdir()) == [] and (home / "work" / "checkpoint").read_text() == "kept"
    if filling.into == "out":
        assert (home / "error.json").exists()  # the child could write it, and the flow its own
        store.put_record("k", {"text": "x" * 100_000})


@pytest.mark.parametrize("failure", [JobFailed("killed", transient=True), EdgepressError("too narrow"), Cancelled()])
def test_failed_stage_keeps_its_checkpoints_only(tmp_path: Path, failure: Exception) -> None:
    store = Store(tmp_path / "store")
    parent = commit(store)
    home = store.root / "work" / identity_of("child", [parent.identity])

    def fail() -> None:
        (home / "out" / "half").touch()
        (home / "work" / "checkpoint").touch()
        raise failure

    with pytest.raises(type(failure)):
        compute(store, parent, FakeExecutor(fail))
    assert list((home / "out").iterdir()) == [] and (home / "work" / "checkpoint").exists()
