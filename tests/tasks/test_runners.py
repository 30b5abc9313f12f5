"""What of the runners needs no cluster: budgets, devices, requests through a folder, settings."""

import errno
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import httpx
import psutil
import pytest
import torch
from prefect.states import Pending

from compression.errors import EdgepressError, Incompatible
from flows.planning import load_recipe, make_plan
from tasks.errors import Cancelled
from tasks.runners.budget import Budget
from tasks.runners.executor import Job
from tasks.runners.folder import EventReader
from tasks.runners.host import Host
from tasks.runners.local import LocalExecutor
from tasks.runners.machine import acquire_devices, default_device, visible_devices, why_no_cuda
from tasks.runners.prefect_pool import PrefectExecutor, _Watch
from tasks.runners.remote import WorkerLost, environment, find_problem, request_job, serve
from tasks.store.store import Store
from tests.flows.recipes import recipe
from tests.tasks.test_children import job, pids_written, silent
from tests.waiting import PATIENCE


@pytest.fixture(autouse=True)
def own_machine_lock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture
def children() -> Iterator[LocalExecutor]:
    made = LocalExecutor(Budget(2))
    made.preload()
    yield made
    made.close()


def never() -> bool:
    return False


def claim(memory: int = 0, threads: int = 1, *, exclusive: bool = False) -> Job:
    return Job("a:b", {}, threads, memory=memory, exclusive=exclusive)


def acquired_by_another(take: Callable[[], AbstractContextManager[Any]]) -> threading.Event:
    """Take a budget or device in a thread; returns what tells that it was taken (and given back)."""
    taken = threading.Event()

    def run() -> None:
        with take():
            taken.set()

    threading.Thread(target=run, daemon=True).start()
    return taken


def test_budget_limits_cores_and_memory() -> None:
    budget = Budget(cores=4, memory=8 << 30)
    with budget.acquire(claim(5 << 30), silent, never):
        assert acquired_by_another(lambda: budget.acquire(claim(1 << 30), silent, never)).wait(PATIENCE)
        large = acquired_by_another(
            lambda: budget.acquire(claim(3 << 30), silent, never)
        )  # 5 + 3 GiB, and what the processes need themselves
        wide = acquired_by_another(lambda: budget.acquire(claim(threads=4), silent, never))
        timed = acquired_by_another(lambda: budget.acquire(claim(exclusive=True), silent, never))
        time.sleep(0.7)
        assert not (large.is_set() or wide.is_set() or timed.is_set())
    assert large.wait(PATIENCE) and wide.wait(PATIENCE) and timed.wait(PATIENCE)


def test_oversized_stage_runs_alone_with_note() -> None:
    events: list[dict[str, Any]] = []
    budget = Budget(cores=4, memory=2 << 30)
    with budget.acquire(claim(9 << 30), events.append, never):
        small = acquired_by_another(lambda: budget.acquire(claim(), silent, never))
        assert not small.wait(0.7)
    assert small.wait(PATIENCE)
    assert [event["note"] for event in events] == ["needs about 9.5 GiB of memory, and there are 2.0 GiB: it runs alone"]


def test_waiting_jobs_keep_their_order() -> None:
    budget, order = Budget(cores=4), []
    cores = ThreadPoolExecutor(8)

    def run(name: str, job: Job, waiting: int) -> None:
        def work() -> None:
            with budget.acquire(job, silent, never):
                order.append(name)

        cores.submit(work)
        while len(budget._queue) < waiting:
            time.sleep(0.01)

    with cores, budget.acquire(claim(threads=2), silent, never):
        run("timed", replace(claim(exclusive=True), order=1), 1)
        run("late", replace(claim(threads=4), order=3), 2)
        run("small", replace(claim(), order=2), 3)  # which would fit beside what runs
        run("early", replace(claim(threads=4), order=0), 4)
        assert order == []
    assert order == ["early", "timed", "small", "late"]


def test_cancelled_job_frees_the_queue() -> None:
    budget, gives_up = Budget(cores=2), threading.Event()
    with budget.acquire(claim(), silent, never), ThreadPoolExecutor(1) as thread:

        def stopped() -> None:
            with pytest.raises(Cancelled), budget.acquire(claim(exclusive=True), silent, gives_up.is_set):
                pass

        first = thread.submit(stopped)
        while not budget._queue:
            time.sleep(0.01)
        second = acquired_by_another(lambda: budget.acquire(claim(), silent, never))
        assert not second.wait(0.2)
        gives_up.set()
        budget.wake()
        first.result(20)
        assert second.wait(20)


def test_waiting_job_can_be_cancelled() -> None:
    budget = Budget(cores=1)
    with budget.acquire(claim(), silent, never), pytest.raises(Cancelled), budget.acquire(claim(), silent, lambda: True):
        pass


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """gpus(...): a machine with these files in /dev, this CUDA_VISIBLE_DEVICES, and a torch built for this CUDA."""

    def machine(files: str = "nvidiactl nvidia0 nvidia1", visible: str | None = None, cuda: str | None = "12.8") -> None:
        for file in files.split():
            (tmp_path / file).touch()
        (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\ncuda: str | None = {cuda!r}\nhip: str | None = None\n")
        monkeypatch.setattr("tasks.runners.machine._DEV", tmp_path)
        monkeypatch.setattr("tasks.runners.machine.find_spec", lambda _: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return machine


@pytest.mark.parametrize(
    ("machine", "device", "reason"),
    [
        ({}, "cuda", ""),
        ({"visible": "1"}, "cuda", ""),
        ({"visible": ""}, "cpu", "CUDA_VISIBLE_DEVICES='' leaves no GPU"),
        ({"visible": "-1,0"}, "cpu", "CUDA_VISIBLE_DEVICES='-1,0' leaves no GPU"),
        ({"cuda": None}, "cpu", "the installed torch is a build for the CPU"),
        ({"files": "null"}, "cpu", "there is no driver of a GPU"),
        ({"files": "nvidiactl"}, "cpu", ""),  # the driver, and no GPU that is known of
        ({"files": "dxg"}, "cpu", ""),  # WSL: whose GPU it is cannot be seen
    ],
)
def test_default_device_is_usable_cuda(gpus: Callable[..., None], machine: dict[str, Any], device: str, reason: str) -> None:
    gpus(**machine)
    assert default_device() == device
    assert why_no_cuda().startswith(reason) and bool(why_no_cuda()) == bool(reason)


def test_torch_build_matches_torch(gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpus()
    monkeypatch.setattr("tasks.runners.machine.find_spec", find_spec)
    assert (why_no_cuda() == "") == (torch.version.cuda is not None or torch.version.hip is not None)


@pytest.mark.parametrize(
    ("named", "seen"),
    [
        ("0,-1,1", ["0"]),
        ("-1", []),
        ("", []),
        ("3, 1", ["3", "1"]),
        ("MIG-a,GPU-b,,2", ["MIG-a", "GPU-b"]),
        ("NoDevFiles", []),
        (None, ["0", "1"]),
    ],
)
def test_visible_gpus_end_at_invalid_name(gpus: Callable[..., None], named: str | None, seen: list[str]) -> None:
    gpus(visible=named)
    assert visible_devices("cuda:0") == seen


def test_gpu_is_locked_by_one_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-ab")
    assert visible_devices("cpu") == visible_devices("mps") == []
    with acquire_devices("cuda", 1) as first, acquire_devices("cuda:0", 1) as second:
        assert (first, second) == (["2"], ["GPU-ab"])
        third = acquired_by_another(lambda: acquire_devices("cuda", 1))
        assert not third.wait(0.5)
    assert third.wait(PATIENCE)
    with acquire_devices("cuda", 3) as every:
        assert every == ["2", "GPU-ab"]
    with acquire_devices("cpu", 1) as none:
        assert none == []


def test_stage_claims_planned_memory(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "r.yaml").write_text(recipe(checkpoint))
    plan = make_plan(load_recipe(tmp_path / "r.yaml"), Store(tmp_path / "store"))
    memory = {task.name: task.memory for task in plan.stages}
    assert memory["distilled"] > memory["pruned"] > 0  # gradients and moments


# --- what travels ---


def test_serve_reads_jobs_folder(children: LocalExecutor, tmp_path: Path) -> None:
    with request_job(tmp_path / "job", [tmp_path], job("succeed", folder=str(tmp_path))) as attempt:
        answer = serve(tmp_path / "job", attempt, children)
    assert answer["done"]["metrics"]["seed"] == 5
    with request_job(tmp_path / "job", [tmp_path], job("mistake")) as attempt:
        assert serve(tmp_path / "job", attempt, children)["mistake"] == {"message": "7 does not divide 64", "key": "group_size"}


def test_withdrawn_request_is_not_served(children: LocalExecutor, tmp_path: Path) -> None:
    with request_job(tmp_path / "job", [tmp_path], job("succeed", folder=str(tmp_path))) as first:
        pass
    assert serve(tmp_path / "job", first, children)["stopped"]  # the flow was killed before a worker came to it
    with request_job(tmp_path / "job", [tmp_path], job("succeed", folder=str(tmp_path))):
        assert serve(tmp_path / "job", first, children)["stopped"]  # requested again: this attempt no longer counts
    assert not (tmp_path / "job" / "result.json").exists()


def test_workers_failure_is_answered(children: LocalExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tasks.runners.local.write_json", full)
    with request_job(tmp_path / "job", [tmp_path], job("succeed", folder=str(tmp_path))) as attempt:
        failed = serve(tmp_path / "job", attempt, children)["failed"]
    assert failed["message"] == "OSError: [Errno 28] No space left on device" and not failed["transient"]


@pytest.mark.slow
def test_killed_host_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPRESS_LOCKS", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # the host's children find `tests`
    host = Host()

    def ask(name: str) -> "Future[dict[str, Any]]":
        with request_job(tmp_path / name, [tmp_path], job(name, folder=str(tmp_path))) as attempt, ThreadPoolExecutor(1) as pool:
            future = pool.submit(host.ask, str(tmp_path / name), attempt)
            if name == "linger":
                child = pids_written(tmp_path)[0]
                psutil.Process(child).parents()[1].kill()  # above the fork server
            future.result(60)
        return future

    lost = ask("linger").result()
    assert lost["failed"]["message"] == "the process that runs jobs for this worker was killed" and lost["failed"]["transient"]
    assert ask("succeed").result()["done"]["metrics"]["seed"] == 5
    host.close()


def test_unfit_worker_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = socket.gethostname()
    assert f"the worker on {host} cannot use {tmp_path / 'none' / 'request.json'}" in str(find_problem(str(tmp_path / "none"), "a"))
    with request_job(tmp_path, [tmp_path, Path("/nowhere")]) as attempt:
        assert f"the worker on {host} does not see /nowhere" in str(find_problem(str(tmp_path), attempt))
    with request_job(tmp_path, [tmp_path]) as attempt:
        assert find_problem(str(tmp_path), attempt) is None
        monkeypatch.setattr("tasks.runners.remote.environment", lambda: {"edgepress": "9", **environment(), "torch": "1.0"})
        assert "has torch 1.0, not" in str(find_problem(str(tmp_path), attempt))


def test_events_continue_with_next_child(tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    reader, file = EventReader(tmp_path), tmp_path / "events.jsonl"
    reader.forward(heard.append)
    file.write_text('{"started": "a/1"}\n{"warning": "x"}\n{"progress": [1, 2')
    reader.forward(heard.append)
    with file.open("a") as stream:  # as tasks/runners/worker.py begins
        stream.write('\n{"started": "b/2"}\n{"warning": "y"}\n')
    reader.forward(heard.append)
    assert heard == [{"warning": "x"}, {"restarted": "its worker was lost; restarted on b/2"}, {"warning": "y"}]


# --- `execution:` ---


@pytest.mark.parametrize(
    ("settings", "line", "message"),
    [
        ("runner: dask", 1, "`runner: dask` needs the scheduler, as `address: tcp://host:8786`; edgepress starts no cluster of its own"),
        ("runner: prefect", 1, "`runner: prefect` needs a work pool, as `pool: NAME`"),
        ("runner: prefect\n  pool: edge\n  address: tcp://h:1", 4, "this belongs to `runner: dask`, and the runner is prefect"),
        ("pool: edge", 2, "this belongs to `runner: prefect`, and the runner is local"),
        ("runner: dask\n  address: localhost", 3, "'localhost'"),
        ("runner: spark", 2, "Input should be 'local', 'dask' or 'prefect'"),
        ("memory_gib: 0", 2, "greater than 0"),
    ],
)
def test_wrong_combination_names_its_line(tmp_path: Path, settings: str, line: int, message: str) -> None:
    text = f"execution:\n  {settings}\n" + recipe("embedded", "  rtn: {uses: quantize.rtn}\n")
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(EdgepressError) as caught:
        load_recipe(tmp_path / "r.yaml")
    assert f"r.yaml:{line}: execution" in str(caught.value) and message in str(caught.value)


def test_identity_excludes_runner_and_job_variables(tmp_path: Path, checkpoint: Path) -> None:
    def identities(*overrides: str) -> list[str]:
        (tmp_path / "r.yaml").write_text(recipe(checkpoint))
        return [task.identity for task in make_plan(load_recipe(tmp_path / "r.yaml", overrides), Store(tmp_path / "store")).stages]

    variables = 'stages.distilled.job_variables={"memory": "8Gi"}'
    assert identities() == identities("execution.runner=dask", "execution.address=tcp://host:8786", "execution.memory_gib=1", variables)


def test_prefect_needs_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with pytest.raises(Incompatible, match="PREFECT_API_URL must name the server"):
        PrefectExecutor(LocalExecutor(Budget(1)), [tmp_path], "edge")


def test_absent_prefect_server_ends_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> None:
        raise httpx.ConnectError("All connection attempts failed")

    monkeypatch.setattr("tasks.runners.prefect_pool.STARTING", -1.0)
    flow_run = SimpleNamespace(state=Pending(), labels={"prefect.worker.name": "machine-1"})
    client: Any = SimpleNamespace(read_flow_run=lambda _: flow_run, read_workers_for_work_pool=away)
    watch = _Watch(client, uuid4(), "edge", tmp_path / "host.lock", tmp_path / "answer.json", lambda _: None, looked=0.0)
    watch.look()
    client.read_workers_for_work_pool = lambda _: []
    watch.looked = 0.0
    with pytest.raises(WorkerLost, match="the worker of the pool edge"):
        watch.look()
