"""Jobs on a real Dask cluster of two worker processes."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compression.errors import EdgepressError, Incompatible
from tasks.errors import Cancelled, JobFailed
from tasks.runners.budget import Budget
from tasks.runners.dask import DaskExecutor
from tasks.runners.local import LocalExecutor
from tests.tasks.cluster import DaskCluster
from tests.tasks.test_children import REPOSITORY, alive, gone, job, pids_written, silent
from tests.waiting import PATIENCE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaskCluster]:
    with DaskCluster(tmp_path_factory.mktemp("dask"), workers=2) as made:
        yield made


@pytest.fixture
def children(cluster: DaskCluster, tmp_path: Path) -> Iterator[DaskExecutor]:
    made = DaskExecutor(LocalExecutor(Budget(2)), [tmp_path], cluster.address)
    made.preload()
    yield made
    made.close()


def test_worker_returns_local_result(children: DaskExecutor, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    done = children.run(job("succeed", folder=str(tmp_path)), tmp_path / "job", events.append)
    assert done.metrics == {"threads": 1, "asked": 1, "seed": 5, "leader": 1}
    assert events == [{"progress": [1, 2, "half"]}, {"metrics": {"loss": 0.5}, "step": 3}, {"warning": "narrow"}]
    assert "belongs into the log" in (tmp_path / "job" / "log.txt").read_text()


def test_remote_failure_spares_worker(children: DaskExecutor, tmp_path: Path) -> None:
    with pytest.raises(EdgepressError, match="7 does not divide 64") as mistake:
        children.run(job("mistake"), tmp_path / "a", silent)
    assert mistake.value.key == "group_size"
    with pytest.raises(JobFailed, match=r"on \S+: .*SIGKILL") as killed:
        children.run(job("killed"), tmp_path / "b", silent)
    assert killed.value.transient
    with pytest.raises(JobFailed, match="timeout of 8 s"):
        children.run(job("linger", timeout=8, folder=str(tmp_path)), tmp_path / "c", silent)
    if (tmp_path / "pids").exists():  # on a busy machine it may have had no time to begin
        assert gone(*pids_written(tmp_path))


def test_close_ends_the_child_on_the_worker(children: DaskExecutor, tmp_path: Path) -> None:
    caught: list[BaseException] = []

    def run() -> None:
        try:
            children.run(job("linger", folder=str(tmp_path)), tmp_path / "job", silent)
        except JobFailed as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    pids = pids_written(tmp_path)
    assert all(alive(pid) for pid in pids)
    children.close()
    thread.join(PATIENCE)
    assert isinstance(caught[0], Cancelled)
    assert gone(*pids)


def test_workers_child_ends_with_killed_flow(cluster: DaskCluster, tmp_path: Path) -> None:
    script = tmp_path / "flow.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\nfrom pathlib import Path\nfrom tests.tasks.test_children import job\n"
        "from tasks.runners.budget import Budget\nfrom tasks.runners.dask import DaskExecutor\nfrom tasks.runners.local import LocalExecutor\n"
        f"if __name__ == '__main__':\n    children = DaskExecutor(LocalExecutor(Budget(2)), [Path({str(tmp_path)!r})], {cluster.address!r})\n"
        f"    children.connect()\n    children.run(job('linger', folder={str(tmp_path)!r}), Path({str(tmp_path / 'job')!r}), print)\n"
    )
    flow = subprocess.Popen([sys.executable, "-P", str(script)])
    pids = pids_written(tmp_path)
    os.kill(flow.pid, signal.SIGKILL)
    flow.wait()
    assert gone(*pids)


def test_lost_job_restarts_on_another_worker(cluster: DaskCluster, tmp_path: Path) -> None:
    children = DaskExecutor(LocalExecutor(Budget(2)), [tmp_path], cluster.address)
    children.connect()
    events: list[dict[str, Any]] = []

    def kill_its_worker() -> None:
        cluster.kill_worker_of(pids_written(tmp_path)[0])
        (tmp_path / "go").touch()

    killer = threading.Thread(target=kill_its_worker)
    killer.start()
    try:
        done = children.run(job("second_time", folder=str(tmp_path)), tmp_path / "job", events.append)
    finally:
        killer.join(PATIENCE)
        children.close()
    assert done.metrics == {"start": 2}
    assert [list(event) for event in events] == [["warning"], ["restarted"], ["warning"]]


def test_unusable_cluster_fails_before_jobs(cluster: DaskCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*paths: Path, address: str = cluster.address) -> None:
        children = DaskExecutor(LocalExecutor(Budget(2)), [tmp_path, *paths], address)
        try:
            children.connect()
        finally:
            children.close()

    with pytest.raises(Incompatible, match=r"no Dask scheduler answers at tcp://127.0.0.1:1 "):
        connect(address="tcp://127.0.0.1:1")
    with pytest.raises(Incompatible, match=r"Dask worker tcp://\S+: the worker on \S+ does not see /nowhere"):
        connect(Path("/nowhere"))
    monkeypatch.setattr("tasks.runners.remote.environment", lambda: {"torch": "1.0"})
    with pytest.raises(Incompatible, match=r"has torch 2\.\S+, not 1\.0"):
        connect()
