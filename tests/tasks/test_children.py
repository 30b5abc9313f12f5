"""Children of a real fork server: what comes back, and that nothing stays behind."""

import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from compression.errors import EdgepressError
from tasks.errors import JobFailed
from tasks.runners import local
from tasks.runners.budget import Budget
from tasks.runners.executor import Executor, Job
from tasks.runners.local import LocalExecutor
from tasks.runners.machine import machine_lock
from tests.drill.place import words_of
from tests.waiting import PATIENCE, until

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_machine_lock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs of other people on this machine must not make these tests wait."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture
def children() -> Iterator[Executor]:
    made = LocalExecutor(Budget(cores=2))
    made.preload()
    yield made
    made.close()


def job(name: str, timeout: float | None = None, *, exclusive: bool = False, **arguments: Any) -> Job:
    return Job(f"tests.tasks.jobs:{name}", arguments, threads=1, seed=5, timeout=timeout, exclusive=exclusive)


def silent(_: dict[str, Any]) -> None:
    return None


def gone(*pids: int) -> bool:
    """Wait until the processes have ended (a zombie has)."""
    return until(lambda: not any(alive(pid) for pid in pids))


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def pids_written(folder: Path) -> list[int]:
    until((folder / "pids").exists, lambda: "the child never started")
    return [int(pid) for pid in (folder / "pids").read_text().split()]


def test_metrics_events_and_prints_return(children: Executor, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    events: list[dict[str, Any]] = []
    metrics = children.run(job("succeed", folder=str(tmp_path)), tmp_path, events.append).metrics
    assert metrics == {"threads": 1, "asked": 1, "seed": 5, "leader": 1}
    assert events == [{"progress": [1, 2, "half"]}, {"metrics": {"loss": 0.5}, "step": 3}, {"warning": "narrow"}]
    assert "belongs into the log" in (tmp_path / "log.txt").read_text()
    assert capfd.readouterr().out == ""


def test_user_error_keeps_message_and_key(children: Executor, tmp_path: Path) -> None:
    with pytest.raises(EdgepressError, match="7 does not divide 64") as caught:
        children.run(job("mistake"), tmp_path, silent)
    assert caught.value.key == "group_size"


@pytest.mark.parametrize(
    ("name", "message", "transient"),
    [
        ("crash", "ZeroDivisionError: one over nothing", False),
        ("out_of_memory", "MemoryError: more than there is", True),
        ("fill_disk", "no space left on the disk", False),
        ("fail_on_full_disk", "no space left on the disk", False),
        ("killed", "SIGKILL", True),
        ("leave", "exit status 7", True),
    ],
)
def test_lost_process_is_transient(children: Executor, tmp_path: Path, name: str, message: str, transient: bool) -> None:
    with pytest.raises(JobFailed, match=message) as caught:
        children.run(job(name), tmp_path, silent)
    assert caught.value.transient is transient
    assert "killed by exit status" not in str(caught.value)


def test_killed_fork_server_is_transient(children: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children.run(job("succeed", folder=str(tmp_path)), tmp_path, silent)  # it has loaded what it preloads
    (server,) = (p for p in psutil.Process().children() if any("multiprocessing.forkserver" in word for word in words_of(p)))
    server.suspend()
    connect = multiprocessing.forkserver.connect_to_new_process

    def struck(*arguments: Any) -> Any:  # it has been asked, and never answers
        asked = connect(*arguments)
        server.kill()
        return asked

    with monkeypatch.context() as patch, pytest.raises(JobFailed, match="the fork server ended") as caught:
        patch.setattr(multiprocessing.forkserver, "connect_to_new_process", struck)
        children.run(job("succeed", folder=str(tmp_path)), tmp_path, silent)
    assert caught.value.transient
    assert children.run(job("succeed", folder=str(tmp_path)), tmp_path, silent).metrics["asked"] == 1


@pytest.mark.slow
def test_deep_temporary_directory_works(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    code = (
        "import tempfile; from tasks.runners.budget import Budget; from tasks.runners.local import LocalExecutor\n"
        "LocalExecutor(Budget(cores=1)).preload(); print(tempfile.gettempdir())"
    )
    environment = {**os.environ, "TMPDIR": str(deep)}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=environment, text=True, capture_output=True, check=True)
    assert done.stdout.strip() == str(deep)


def test_earlier_result_is_ignored(children: Executor, tmp_path: Path) -> None:
    children.run(job("succeed", folder=str(tmp_path)), tmp_path, silent)
    with pytest.raises(JobFailed, match="SIGKILL"):
        children.run(job("killed"), tmp_path, silent)


def test_timeout_ends_process_group(children: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed = [0.0]
    monkeypatch.setattr(local, "time", SimpleNamespace(monotonic=lambda: passed[0]))
    caught: list[BaseException] = []

    def run() -> None:
        try:
            children.run(job("linger", timeout=3600, folder=str(tmp_path)), tmp_path, silent)
        except JobFailed as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    pids = pids_written(tmp_path)
    assert all(alive(pid) for pid in pids)
    passed[0] = 3601
    thread.join(PATIENCE)
    assert "timeout of 3600 s" in str(caught[0])
    assert gone(*pids)


def test_timeout_before_process_group_exists(children: Executor, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(JobFailed, match="timeout") as caught:
        children.run(job("linger", timeout=1e-6, folder=str(tmp_path)), tmp_path, silent)
    assert not caught.value.transient  # it would take as long again
    assert time.monotonic() - started < 500  # the child sleeps for ten minutes


def test_close_ends_all_jobs(children: Executor, tmp_path: Path) -> None:
    caught: list[BaseException] = []

    def run() -> None:
        try:
            children.run(job("linger", folder=str(tmp_path)), tmp_path, silent)
        except JobFailed as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    pids = pids_written(tmp_path)
    children.close()
    thread.join(PATIENCE)
    assert [str(error) for error in caught] == ["stopped"]
    assert gone(*pids)
    with pytest.raises(JobFailed, match="stopped"):
        children.run(job("succeed", folder=str(tmp_path)), tmp_path / "later", silent)
    assert not (tmp_path / "later" / "result.json").exists()


def test_close_ends_wait_for_machine(children: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.runners.local.PATIENCE", 0.2)
    holder = hold_machine(tmp_path)
    try:
        caught: list[BaseException] = []
        heard: list[dict[str, Any]] = []

        def run() -> None:
            try:
                children.run(job("succeed", exclusive=True, folder=str(tmp_path)), tmp_path, heard.append)
            except JobFailed as error:
                caught.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        until(lambda: heard)
        children.close()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert heard == [{"note": "waits for other runs of edgepress on this machine: it is timed alone"}]
        assert [str(error) for error in caught] == ["stopped"]
    finally:
        holder.kill()
        holder.wait()


def hold_machine(folder: Path) -> subprocess.Popen[str]:
    """A process of another pipeline that works, and so holds the machine's lock shared."""
    code = (
        f"import tempfile; tempfile.tempdir = {str(folder)!r}\nimport sys\nfrom tasks.runners.machine import machine_lock\n"
        "with machine_lock(exclusive=False):\n    print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-P", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_machine_lock_dies_with_its_owner(tmp_path: Path) -> None:
    holder = hold_machine(tmp_path)
    entered, followed = threading.Event(), threading.Event()

    def take(exclusive: bool, told: threading.Event) -> None:
        with machine_lock(exclusive=exclusive):
            told.set()
            time.sleep(0.1)

    timing = threading.Thread(target=take, args=(True, entered))
    working = threading.Thread(target=take, args=(False, followed))
    with machine_lock(exclusive=False):  # work goes beside work
        timing.start()
        assert not entered.wait(0.5)
    working.start()
    assert not followed.wait(0.5)  # but does not come in before who waits to be alone, or that would wait forever
    holder.kill()
    holder.wait()
    timing.join(PATIENCE)
    working.join(PATIENCE)
    assert entered.is_set() and followed.is_set()


def test_machine_lock_lies_in_shared_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPRESS_LOCKS", str(tmp_path))
    with machine_lock(exclusive=True):
        assert (tmp_path / "edgepress-machine.lock").exists()
    monkeypatch.setenv("EDGEPRESS_LOCKS", str(tmp_path / "unmounted"))
    with pytest.raises(EdgepressError, match="EDGEPRESS_LOCKS=.*unmounted"), machine_lock(exclusive=True):
        pass


@pytest.mark.slow
def test_children_die_with_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "flow.py"
    script.write_text(
        f"import tempfile; tempfile.tempdir = {str(tmp_path)!r}\nimport sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from pathlib import Path\nfrom tasks.runners.executor import Job\n"
        "from tasks.runners.budget import Budget\nfrom tasks.runners.local import LocalExecutor\n"
        "if __name__ == '__main__':\n    children = LocalExecutor(Budget(2))\n    children.preload()\n"
        f"    children.run(Job('tests.tasks.jobs:linger', {{'folder': {str(tmp_path)!r}}}, 1), Path({str(tmp_path / 'job')!r}), print)\n"
    )
    parent = subprocess.Popen([sys.executable, "-P", str(script)])
    child, grandchild = pids_written(tmp_path)
    server = psutil.Process(child).ppid()
    assert server != parent.pid  # the fork server stands between
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert gone(child, grandchild, server)


@pytest.mark.slow
def test_fork_server_ignores_ctrl_c(tmp_path: Path) -> None:
    """A terminal sends it to all of its processes, also to the server while it imports torch."""
    code = (
        f"import tempfile; tempfile.tempdir = {str(tmp_path)!r}\nimport signal, sys\n"
        "from tasks.runners.budget import Budget\nfrom tasks.runners.local import LocalExecutor\n"
        "signal.signal(signal.SIGINT, lambda *_: print('heard', flush=True))\nLocalExecutor(Budget(2)).preload()\n"
        "print('importing', flush=True)\nsys.stdin.read()"
    )
    flow = subprocess.Popen(
        [sys.executable, "-P", "-c", code], cwd=REPOSITORY, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    assert flow.stdout is not None and flow.stdout.readline() == "importing\n"
    servers = [child for child in psutil.Process(flow.pid).children() if "multiprocessing.forkserver" in " ".join(child.cmdline())]
    os.killpg(flow.pid, signal.SIGINT)
    assert flow.stdout.readline() == "heard\n"
    assert len(psutil.wait_procs(servers, timeout=1)[1]) == 1
    _, err = flow.communicate("", timeout=PATIENCE)
    assert (flow.returncode, err) == (0, "")
