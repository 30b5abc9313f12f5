"""A job, its result, and the protocol of an executor, which runs jobs. Imports no torch.

The implementations are in tasks/runners: on this machine, on a Dask cluster, on the workers of a Prefect pool.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from compression.evaluation.findings import Items

EventHandler = Callable[[dict[str, Any]], None]
"""Called with each event of a job: {"progress": [done, total, what]}, {"metrics": {}, "step": n}, {"warning": text} from the job itself; {"note": text}
about where and how it runs; {"restarted": text} when it starts again because its worker was lost: its earlier events no longer count."""


@dataclass(frozen=True)
class Job:
    """One call of `module:function(**arguments, threads=, context=)` in a child.

    Attributes:
        call: `module:function`.
        arguments: JSON.
        threads: Threads of torch.
        seed: The seed of the context.
        device: The device of the context. These five reach the child; the others say how the job runs.
        timeout: Seconds it may work; a job that takes longer fails, and is not retried.
        exclusive: A timing: nothing else of edgepress may run on the machine meanwhile, and it runs on the flow's machine.
        name: The stage's, for people.
        memory: Bytes it claims of a budget; a rough estimate from shapes.
        devices: GPUs it claims, where `device` is one.
        variables: For the infrastructure of a Prefect work pool, such as a GPU or a memory request.
        order: The position of its stage in the plan: jobs that wait for cores and memory start in this order.
    """

    call: str
    arguments: dict[str, Any]
    threads: int
    seed: int = 0
    device: str = "cpu"
    timeout: float | None = None
    exclusive: bool = False
    name: str = ""
    memory: int = 0
    devices: int = 1
    variables: Mapping[str, Any] = field(default_factory=dict)
    order: int = 0


@dataclass(frozen=True)
class JobResult:
    """What the function of a job returned, and the seconds that it worked (without waiting and start-up)."""

    metrics: dict[str, float]
    seconds: float
    items: dict[str, Items] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def read(document: Mapping[str, Any]) -> "JobResult":
        """Read `result.json`."""
        items = {metric: Items.read(found) for metric, found in document["items"].items()}
        return JobResult(document["metrics"], document["seconds"], items, document["details"])


class Executor(Protocol):
    """Runs the jobs of one flow."""

    def preload(self) -> None:
        """Prepare while the caller continues. Call it from the main thread, before any job. Raises EdgepressError for what cannot work."""

    def run(self, job: Job, folder: Path, on_event: EventHandler) -> JobResult:
        """Run a job to its end and return its result.

        Args:
            job: The job.
            folder: Gets its files (tasks/runners/folder.py).
            on_event: Gets its events as they come.

        Raises:
            EdgepressError: It failed for a cause that the user can mend.
            JobFailed: It crashed, was killed, or ran past its timeout.
            Cancelled: The executor was closed.
        """

    @property
    def closed(self) -> bool:
        """Whether `close` was called; then everything that waits for the flow gives up."""

    def close(self) -> None:
        """End all jobs; nothing can be started afterwards. May be called twice."""
