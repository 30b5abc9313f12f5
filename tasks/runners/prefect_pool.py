"""Jobs on the workers of a Prefect work pool: `runner: prefect`. Prefect is imported when the server is known. Imports no torch."""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any
from uuid import UUID

from compression.errors import Incompatible
from compression.locks import is_locked
from tasks.errors import Cancelled, JobFailed
from tasks.runners.executor import Job
from tasks.runners.local import LocalExecutor
from tasks.runners.remote import RemoteExecutor, WorkerLost, heartbeat_lock, response_file
from tasks.store.owner import owner_tag

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import State

_SAFE = {"PYTHONSAFEPATH": "1"}  # a user's own tasks.py where a worker was started must not shadow ours
STARTING = 30.0
"""Seconds from Running, which precedes the flow's first line, until the job's process must hold its lock."""


class PrefectExecutor(RemoteExecutor):
    """Runs jobs on the workers of a pool: each is a flow run of a deployment there, which this creates.

    Create it before the flow has a server of its own: PREFECT_API_URL names that from then on, and no worker uses it.
    """

    def __init__(self, local: LocalExecutor, paths: Sequence[Path], pool: str):
        super().__init__(local, paths)
        if not os.environ.get("PREFECT_API_URL"):
            raise Incompatible(
                "execution.runner: with `runner: prefect`, PREFECT_API_URL must name the server that the pool's workers ask",
                key="execution",
            )
        self._pool = pool
        self._deployment: UUID | None = None

    def connect(self) -> None:
        from httpx import HTTPError

        try:
            self._deployment = self._deployed()
        except HTTPError as error:
            raise Incompatible(
                f"execution.runner: Prefect's server at {os.environ['PREFECT_API_URL']} does not answer ({error})", key="execution"
            ) from None

    def _deployed(self) -> UUID:
        """Make the deployment on the pool, or bring it up to date. Raises Incompatible for a pool that is not there."""
        from prefect.client.orchestration import get_client
        from prefect.exceptions import ObjectNotFound

        with get_client(sync_client=True) as client:
            try:
                pool = client.read_work_pool(self._pool)
            except ObjectNotFound:
                known = ", ".join(pool.name for pool in client.read_work_pools()) or "none"
                raise Incompatible(
                    f"execution.pool: there is no work pool {self._pool!r} at {client.api_url} (known: {known})", key="execution"
                ) from None
            takes = pool.base_job_template.get("variables", {}).get("properties", {})
            return client.create_deployment(
                client.create_flow_from_name("edgepress-job"), self._pool, work_pool_name=self._pool, entrypoint="tasks.runners.prefect_job.job",
                pull_steps=[], job_variables={"env": _SAFE} if "env" in takes else {}, enforce_parameter_schema=False, tags=["edgepress"],
                description="Jobs of edgepress runs with `runner: prefect`; made and changed by them.",
            )  # fmt: skip

    def run_remotely(
        self, job: Job, folder: Path, attempt: str, forward: Callable[[], None], note: Callable[[str], None]
    ) -> dict[str, Any]:
        from httpx import HTTPError
        from prefect import states
        from prefect.client.orchestration import get_client

        answer = response_file(folder, attempt)
        with get_client(sync_client=True) as client:
            run = self._start_flow_run(client, job, folder, attempt)
            watch = _Watch(client, run, self._pool, heartbeat_lock(folder, attempt), answer, note)
            try:
                while not answer.exists():
                    if self.closed:
                        raise Cancelled()
                    forward()
                    watch.look()
                    sleep(0.2)
            except (Cancelled, WorkerLost) as error:
                stopped = isinstance(error, Cancelled)
                ended: State[Any] = (
                    states.Cancelled(message="the run that waits was stopped") if stopped else states.Crashed(message=str(error))
                )
                with suppress(HTTPError):  # what is to be done does not wait for a server that is away
                    client.set_flow_run_state(run, ended, force=True)
                raise
        found: dict[str, Any] = json.loads(answer.read_text())
        for leftover in (answer, heartbeat_lock(folder, attempt)):
            leftover.unlink(missing_ok=True)
        return found

    def _start_flow_run(self, client: "SyncPrefectClient", job: Job, folder: Path, attempt: str) -> UUID:
        """Start a flow run on the pool. Raises Incompatible where it refuses the stage's variables, JobFailed where the server does not answer."""
        from httpx import TransportError
        from prefect.exceptions import PrefectHTTPStatusError

        assert self._deployment is not None
        variables = dict(job.variables)
        if "env" in variables:
            variables["env"] = {**_SAFE, **variables["env"]}
        try:
            return client.create_flow_run_from_deployment(
                self._deployment, parameters={"folder": str(folder), "attempt": attempt}, name=job.name or job.call.partition(":")[2],
                job_variables=variables, tags=["edgepress", f"owner:{owner_tag()}"],
            ).id  # fmt: skip
        except PrefectHTTPStatusError as error:
            if not job.variables or error.response.status_code not in (409, 422):
                raise
            raise Incompatible(
                f"the pool {self._pool} does not take job_variables {variables}: {error.response.text}", key="job_variables"
            ) from None
        except TransportError as error:
            raise JobFailed(
                f"Prefect's server at {client.api_url} does not answer ({error or type(error).__name__})", transient=True
            ) from None


@dataclass
class _Watch:
    """Checks whether a job without an answer can still give one."""

    client: "SyncPrefectClient"
    run: UUID
    pool: str
    lock: Path
    answer: Path
    note: Callable[[str], None]
    seen_alive: bool = False  # the job's process
    looked: float = field(default_factory=monotonic)
    since: dict[str, float] = field(default_factory=dict)  # when each type of state was seen first
    notified: bool = False

    def look(self) -> None:
        """Raises WorkerLost where the job's process or its worker died, JobFailed where the worker could not start it."""
        from httpx import HTTPError

        alive = is_locked(self.lock)
        if self.seen_alive and not alive and not self.answer.exists():
            raise WorkerLost("the process that worked on it for a Prefect worker was killed")
        self.seen_alive = self.seen_alive or alive
        if monotonic() - self.looked < 2:
            return
        self.looked = monotonic()
        with suppress(HTTPError):  # the server is away: the folder tells how it ended, whatever the server knows
            self._judge(self.client.read_flow_run(self.run).state)

    def _judge(self, state: "State[Any] | None") -> None:
        """Raises what the state of its flow run, and the pool's workers, say of it."""
        if state is None or self.answer.exists():
            return
        waited = monotonic() - self.since.setdefault(state.type.value, monotonic())
        if state.is_final() and waited < 4:
            return  # its answer may take a moment to be seen here
        if state.is_failed():
            raise JobFailed(f"a worker of the pool {self.pool} could not start: {state.message}", transient=False)
        if state.is_final():
            raise WorkerLost(f"a worker of the pool {self.pool} ended it: {state.name}, {state.message}")
        if state.is_running() and not self.seen_alive and waited > STARTING:
            raise WorkerLost(f"a worker of the pool {self.pool} reported that it runs, and none of its processes is alive")
        if state.is_pending() and waited > STARTING and self._worker_is_gone():
            raise WorkerLost(f"the worker of the pool {self.pool} that accepted it is gone")
        if state.is_scheduled() and waited > STARTING and not self.notified and not self._online():
            self.notified = True
            self.note(f"waits: no worker of the pool {self.pool} is online (prefect worker start --pool {self.pool})")

    def _online(self) -> list[str]:
        return [worker.name for worker in self.client.read_workers_for_work_pool(self.pool) if worker.status.value == "ONLINE"]

    def _worker_is_gone(self) -> bool:
        return self.client.read_flow_run(self.run).labels.get("prefect.worker.name") not in self._online()
