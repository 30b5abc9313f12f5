"""Jobs on a Dask cluster: `runner: dask`. Imports no torch."""

import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from shutil import rmtree
from time import monotonic, sleep
from typing import Any

from compression.errors import Incompatible, MissingExtra
from tasks.errors import Cancelled, JobFailed
from tasks.runners.executor import Job
from tasks.runners.host import Host
from tasks.runners.local import LocalExecutor
from tasks.runners.remote import RemoteExecutor, find_problem, request_job

try:
    from distributed import Client, Future, KilledWorker, WorkerPlugin, get_worker
except ModuleNotFoundError:
    raise MissingExtra("distributed", "dask", "`runner: dask`") from None

PLUGIN = "edgepress"
NO_WORKER = 60.0
"""Seconds without any worker in the cluster after which a job fails."""


class HostPlugin(WorkerPlugin):
    """Keeps a `Host` on every worker of the cluster, for all flows that use it."""

    name = PLUGIN
    idempotent = True  # another flow's host is as good

    def setup(self, worker: Any) -> None:
        self.host = Host()

    def teardown(self, worker: Any) -> None:
        self.host.close()


def serve_on_worker(folder: str, attempt: str) -> dict[str, Any]:
    """What Dask runs: the worker's host serves the folder."""
    plugin = get_worker().plugins[PLUGIN]
    assert isinstance(plugin, HostPlugin)
    return plugin.host.ask(folder, attempt)


class DaskExecutor(RemoteExecutor):
    """Children on the workers of a Dask cluster. Dask itself runs a job again whose worker died, and gives it up after its `allowed-failures`."""

    def __init__(self, local: LocalExecutor, paths: Sequence[Path], address: str):
        super().__init__(local, paths)
        self._address = address
        self._client: Client | None = None
        self._waiting = 0
        self._left = threading.Condition()

    def connect(self) -> None:
        try:
            self._client = Client(self._address, timeout=5, set_as_default=False)
        except (OSError, TimeoutError) as error:
            raise Incompatible(f"execution.address: no Dask scheduler answers at {self._address} ({error})", key="execution") from None
        if not self._client.nthreads():
            raise Incompatible(
                f"execution.address: {self._address} has no worker: start some with `dask worker {self._address}`", key="execution"
            )
        folder = self._paths[0] / "work" / f"dask-{uuid.uuid4().hex[:8]}"
        try:
            with request_job(folder, self._paths) as attempt:
                found = self._client.run(find_problem, str(folder), attempt, on_error="return")
        finally:
            rmtree(folder, ignore_errors=True)
        wrong = {worker: trouble for worker, trouble in found.items() if trouble is not None}
        if wrong:
            raise Incompatible(
                "\n".join(f"execution.address: Dask worker {worker}: {_error_text(trouble)}" for worker, trouble in wrong.items()),
                key="execution",
            )
        self._client.register_plugin(HostPlugin(), name=PLUGIN)

    def run_remotely(
        self, job: Job, folder: Path, attempt: str, forward: Callable[[], None], note: Callable[[str], None]
    ) -> dict[str, Any]:
        assert self._client is not None
        on_gpu = job.device.partition(":")[0] == "cuda"
        if on_gpu and not any(
            worker["resources"].get("GPU", 0) >= job.devices for worker in self._client.scheduler_info()["workers"].values()
        ):
            raise Incompatible(
                f"no Dask worker offers {job.devices} GPU: start one with `dask worker ADDRESS --resources GPU={job.devices}`", key="device"
            )
        with self._left:
            self._waiting += 1
        try:
            future = self._client.submit(
                serve_on_worker, str(folder), attempt, key=f"edgepress-{job.name or job.call}-{attempt}", pure=False,
                resources={"GPU": job.devices} if on_gpu else None,
            )  # fmt: skip
            self._wait(future, forward, note)
            return future.result()
        except KilledWorker as error:
            raise JobFailed(str(error).split(" Inspecting")[0], transient=True) from None
        except (CancelledError, OSError) as error:
            raise JobFailed(f"the Dask scheduler at {self._address} was lost: {error}", transient=True) from None
        finally:
            with self._left:
                self._waiting -= 1
                self._left.notify_all()

    def _wait(self, future: Future, forward: Callable[[], None], note: Callable[[str], None]) -> None:
        """Until the future is done. Raises Cancelled, and JobFailed where the cluster has lost all its workers."""
        assert self._client is not None
        seen = looked = monotonic()
        while not future.done():
            if self.closed:
                raise Cancelled()
            forward()
            sleep(0.1)
            if monotonic() - looked > 5:
                looked = monotonic()
                if self._client.nthreads():
                    seen = looked
                elif looked - seen <= 5:
                    note(f"waits: the Dask cluster at {self._address} has no worker now")
                elif looked - seen > NO_WORKER:
                    raise JobFailed(f"no worker remains in the Dask cluster at {self._address}", transient=False)

    def close(self) -> None:
        super().close()
        with self._left:
            self._left.wait_for(lambda: not self._waiting, timeout=10)  # threads that wait for a job still use the client
        if self._client is not None:
            self._client.close()


def _error_text(trouble: Any) -> str:
    if isinstance(trouble, ModuleNotFoundError):
        return f"it has no module {trouble.name}: edgepress must be installed there as here"
    return str(trouble)
