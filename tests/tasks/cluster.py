"""Clusters of real processes on this machine, started with their own commands: Dask's and Prefect's."""

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Self

import psutil

from tests.waiting import PATIENCE, until

REPOSITORY = Path(__file__).parents[2]


class Cluster:
    """A server and workers, each a process tree (a "machine") of its own, until the block ends. `address`: where flows reach it."""

    address: str

    def __init__(self, folder: Path, workers: int, **environment: str):
        self._folder = folder
        self._count = workers
        self._environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TMPDIR": str(folder), **environment}
        self._servers: list[subprocess.Popen[bytes]] = []
        self._workers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in (*self._workers, *self._servers):
            _kill(process)

    def start(self) -> None:
        raise NotImplementedError

    def kill_worker_of(self, child: int) -> None:
        """SIGKILL the whole "machine" on which a child works."""
        above = {process.pid for process in psutil.Process(child).parents()}
        (worker,) = [process for process in self._workers if process.pid in above]
        _kill(worker)

    def run(self, *command: str) -> "subprocess.Popen[bytes]":
        with self.log.open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", *command],
                cwd=self._folder,
                env=self._environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def log(self) -> Path:
        return self._folder / "log.txt"

    def wait(self, ready: Callable[[], bool]) -> None:
        until(ready, self.log.read_text)


class DaskCluster(Cluster):
    """A Dask scheduler and workers of one thread each."""

    def start(self) -> None:
        from distributed import Client

        at = ("--scheduler-file", "s.json", "--no-dashboard")
        self._servers = [self.run("dask", "scheduler", "--host", "127.0.0.1", "--port", "0", *at)]
        self._workers = [self.run("dask", "worker", *at, "--nthreads", "1", "--local-directory", "scratch") for _ in range(self._count)]
        self.wait((self._folder / "s.json").exists)
        with Client(scheduler_file=str(self._folder / "s.json"), set_as_default=False) as client:
            client.wait_for_workers(self._count, timeout=PATIENCE)
            self.address = client.scheduler.address


class PrefectPool(Cluster):
    """A Prefect server with a pool named `edge`, and process workers of it that take one flow run at a time."""

    def __init__(self, folder: Path, workers: int):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self._port}/api"
        super().__init__(
            folder, workers, PREFECT_HOME=str(folder / "prefect"), PREFECT_API_URL=self.address, PREFECT_SERVER_ANALYTICS_ENABLED="false",
            PREFECT_WORKER_QUERY_SECONDS="1",
        )  # fmt: skip

    def start(self) -> None:
        self._servers = [self.run("prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self._port), "--no-ui")]
        self.wait(self._answers)
        created = self.run("prefect", "work-pool", "create", "edge", "--type", "process")
        assert created.wait(PATIENCE) == 0, self.log.read_text()
        self._workers = [
            self.run("prefect", "worker", "start", "--pool", "edge", "--limit", "1", "--name", f"machine-{i}") for i in range(self._count)
        ]

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=60):
                return True
        except OSError:
            return False


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """The process and everything below it, whatever its group, at once."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        family = []
    for member in reversed(family):
        try:
            os.kill(member.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
